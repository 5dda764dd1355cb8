"""The committed results, and the pages that report them."""
import json
import re
import shlex
import statistics
import sys
from itertools import chain

import pytest
from conftest import ROOT, run_script
from scipy import stats
from transformers import BertConfig, BertForSequenceClassification

from experiments import replicate as replicate_script
from experiments.model_records import Records
from experiments.settings import read_settings
from simplified_tinybert.common.files import Problems
from simplified_tinybert.model.bert import count_parameters

RESULTS = ROOT / "experiments" / "results"
SUMMARY = RESULTS / "summary.json"
STUDIES = {"replication.md": ["worldtree", "ablations", "small-student", "longer", "squad-sentences", "example"],
           "replication-nfcorpus.md": ["cranfield", "nfcorpus", "nfcorpus-cold"]}


@pytest.mark.parametrize("name", ["worldtree", "nfcorpus"])
def test_parameters_in_the_committed_results(name):
    """Counted anew; packing the weights for a CPU once hid most of them."""
    bert = {"vocab_size": 30522, "num_attention_heads": 12, "max_position_embeddings": 512}
    for system in json.loads((RESULTS / f"{name}.json").read_text())["systems"]:
        if system["shape"]:
            layers, hidden_size = map(int, system["shape"].split("/"))
            config = BertConfig(**bert, num_hidden_layers=layers, hidden_size=hidden_size,
                                intermediate_size=4 * hidden_size, num_labels=2)
            assert system["parameters"] == count_parameters(BertForSequenceClassification(config))


def test_every_committed_result_is_on_a_page():
    assert {path.stem for path in RESULTS.glob("*.json")} - {"summary"} == {*chain.from_iterable(STUDIES.values())}


@pytest.mark.parametrize("page", STUDIES)
def test_the_document_has_the_tables_of_the_committed_results(tmp_path, page):
    """The tables in the page and in experiments/results equal those that findings.py makes."""
    document = tmp_path / page
    document.write_bytes((ROOT / "docs" / page).read_bytes())
    done = run_script("experiments.findings", *(RESULTS / f"{name}.json" for name in STUDIES[page]), "--output_dir",
                      tmp_path / "out", "--document", document)
    assert done.returncode == 0, done.stderr
    assert document.read_text() == (ROOT / "docs" / page).read_text()
    for path in (tmp_path / "out").glob("*.md"):
        assert path.read_text() == (RESULTS / path.name).read_text()


def test_the_summary_is_that_of_the_committed_results(tmp_path):
    results = [SUMMARY.with_name(f"{name}.json") for name in json.loads(SUMMARY.read_text())["collections"]]
    done = run_script("experiments.findings", *results, "--output_dir", tmp_path, "--summary", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.json").read_text() == SUMMARY.read_text()


@pytest.mark.parametrize(("page", "end", "least", "from_a_log"), [
    ("replication.md", "## Set-up", (30, 9), set()),
    ("replication-nfcorpus.md", "## NFCorpus", (40, 12), {"0.3044", "0.3068", "0.3049"})])
def test_the_findings_are_those_of_the_committed_results(page, end, least, from_a_log):
    """Every figure of four decimals in the text is also in a table, except those from a log."""
    text = (ROOT / "docs" / page).read_text().partition(end)[0].replace("−", "-")
    tables = "".join((RESULTS / f"{name}.md").read_text() for name in STUDIES[page])
    text = re.sub(r"(?m)^\| [^|]+(?: \| (?:0\.\d{4}|–)){3} \|$", "", text)       # a row of the next test
    figures = set(re.findall(r"[-+]?0\.\d{4}", text)) - from_a_log
    assert len(figures) > least[0] and not [figure for figure in figures if figure not in tables]
    intervals = re.findall(r"([-+]0\.\d{4}) \(([-+]0\.\d{4} to [-+]0\.\d{4})", text)
    rows = [re.findall(r"[-+]0\.\d{4}(?: to [-+]0\.\d{4})?", line) for line in tables.splitlines()]
    assert len(intervals) > least[1] and not [pair for pair in intervals if list(pair) not in rows]


def test_the_commands_of_the_document_are_understood(monkeypatch):
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / "docs" / "replication.md").read_text())
    lines = re.findall(r"python -m (experiments\.replicate [^\n]*)", text)
    assert len(lines) >= 2
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        args, problems = replicate_script.parse_args(), Problems()
        assert read_settings(ROOT / args.settings, problems) and not problems.count, problems.messages


def test_the_progress_of_the_students_is_reported_as_recorded():
    """Half an epoch: the trial of the chosen learning rate. One and two epochs: the student with the first seed."""
    results = json.loads((RESULTS / "worldtree.json").read_text())
    text, titles = (ROOT / "docs" / "replication.md").read_text(), results["settings"]["titles"]
    chosen = [run for run in results["tuned"] if run["chosen"]]
    for run in chosen:
        name = f"3-384-{run['method']}-{run['learning_rate']:g}-seed1.json"
        one, two = (f"{row['nDCG@10']:.4f}" for row in json.loads((RESULTS / "worldtree" / name).read_text())["dev"])
        one = "–" if run["method"] == "tinybert" else one               # its first validation is in the second stage
        assert f"| {titles[run['method']]} | {run['dev']:.4f} | {one} | {two} |" in text
    rates = sorted((run["learning_rate"], run["dev"]) for run in results["tuned"]
                   if run["method"] == results["settings"]["proposed"])
    values = ", ".join(f"{value:.4f}" for _, value in rates)
    assert f"Simplified TinyBERT has {values} at 5e-5, 1e-4, 2e-4, 4e-4 and 8e-4" in " ".join(text.split())
    assert [rate for rate, _ in rates] == [5e-5, 1e-4, 2e-4, 4e-4, 8e-4]


def test_the_first_table_of_the_readme_is_the_summary():
    text, studies = (ROOT / "README.md").read_text(), json.loads(SUMMARY.read_text())["collections"]
    results = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in studies}
    (first, worldtree), (second, squad) = studies.items()
    titles = results[first]["settings"]["titles"]

    def interval(found):
        return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"

    def cells(study, found, mean):
        return f"{mean:.4f} | {interval(found)}"
    rows = [f"| WorldTree ({worldtree['queries']} queries) | minus BM25 |",
            f"| squad-sentences ({squad['queries']:,} queries) | minus BM25 |",
            f"| {worldtree['bm25']:.4f} | – | {squad['bm25']:.4f} | – | – |",
            "| " + " | ".join(cells(study, study["teacher_minus_bm25"], study["teacher"]) for study in studies.values())
            + " | 1.00 × |"]
    of_method = [{student["method"]: student for student in study["students"]} for study in studies.values()]
    for method, student in of_method[0].items():
        bold = "**" * (method == "simplified-masked")
        both = [cells(study, students[method]["minus_bm25"], students[method]["mean"])
                for study, students in zip(studies.values(), of_method)]
        rows.append(f"| {bold}student: {titles[method]}{bold} | {student['shape']} | {' | '.join(both)} | "
                    f"{student['speed_up']:.3g} × |")
    assert not [row for row in rows if row not in text]
    text = " ".join(text.split())
    proposed = [students["simplified-masked"] for students in of_method]
    retained = [f"{100 * student['retention']:.1f} %" for student in proposed]
    assert f"keeps {retained[0]} and {retained[1]} of its teacher's nDCG@10" in text
    differences = [interval(student["minus_teacher"]) for student in proposed]
    assert f"minus its teacher: {' and '.join(differences)};" in text
    found = [results[name]["comparisons"]["3/384 simplified-masked"]["nDCG@10"]["3/384 tinybert"] for name in studies]
    found = [each | dict(zip(("low", "high"), each["interval"])) for each in found]
    assert f"minus TinyBERT: {interval(found[0])} and {interval(found[1])}" in text
    teacher, student = (statistics.fmean(results[first]["interpolated"][name]["seeds"]["nDCG@10"])
                        for name in ("teacher", "3/384 simplified-masked"))
    assert f"With BM25's scores added, the teacher has {teacher:.4f} on WorldTree, the student {student:.4f}." in text


def test_the_worldtree_teacher_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().partition("## The teacher")[2]
    directory = ROOT / "experiments" / "results" / "worldtree"
    bm25, teacher = (json.loads((directory / f"{name}.json").read_text()) for name in ("BM25", "teacher-5e-05-seed1"))
    for measure, before in bm25["test"].items():
        found = stats.ttest_rel(after := teacher["test"][measure], before)
        low, high = found.confidence_interval()
        means = statistics.fmean(before), statistics.fmean(after)
        assert (f"| {measure} | {means[0]:.4f} | {means[1]:.4f} | {means[1] - means[0]:+.4f} | {low:+.4f} to "
                f"{high:+.4f} | {found.pvalue:.2g} |") in text
    trials = json.loads((directory / "trials.json").read_text())["trials"]
    for trial in trials:
        values = ", ".join(f"{value:.4f}" for value in trial["dev"].values())
        stopped = ", stopped" if trial.get("stopped") else ""
        assert f"| {trial['batch size']} | {trial['learning rate']:g} | {trial['epochs']} | {values}{stopped} |" in text
    assert list(trials[-1]["dev"].values()) == [row["nDCG@10"] for row in teacher["dev"]]
    for seed in (2, 3):
        name = f"teacher-5e-05-seed{seed}"
        found = stats.ttest_rel(values := Records(directory, {}).read(name)["test"]["nDCG@10"], bm25["test"]["nDCG@10"])
        low, high = found.confidence_interval()
        difference = statistics.fmean(values) - statistics.fmean(bm25["test"]["nDCG@10"])
        assert f"{Records(directory, {}).dev(name):.4f}" in text and found.pvalue < 0.001
        assert f"{difference:+.4f} ({low:+.4f} to {high:+.4f})" in text
    assert f"exceeds BM25's by {teacher['dev'][-1]['nDCG@10'] - 0.481641:.4f}" in text


def test_the_first_worldtree_teacher_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().partition("### The first teacher")[2]
    directory = ROOT / "experiments" / "results" / "worldtree-first"
    for name, split in json.loads((directory / "depths.json").read_text())["splits"].items():
        cells = [f"{depth['teacher']:.4f} ({depth['difference']:+.4f})" for depth in split["depths"].values()]
        assert f"| {name}, {split['queries']} queries | {split['bm25']:.4f} | {' | '.join(cells)} |" in text
    test = json.loads((directory / "teacher-5e-05-seed1.json").read_text())["test"]["nDCG@10"]
    assert f"{statistics.fmean(test):.4f}" == f"{split['depths']['50']['teacher']:.4f}"


def test_the_second_collection_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().partition("## A second collection")[2].partition("<!--")[0]
    results, words = json.loads((RESULTS / "squad-sentences.json").read_text()), " ".join(text.split())
    records = Records(RESULTS / "squad-sentences", {})
    teacher, bm25 = records.read("teacher-5e-05-seed1"), results["dev"]["nDCG@10"]["BM25"]
    assert f"has {records.dev('teacher-5e-05-seed1'):.4f} on the dev queries, BM25 {bm25:.4f}" in words
    seconds = []
    for run in results["tuned"]:
        if run["chosen"]:
            names = [f"3-384-{run['method']}-{run['learning_rate']:g}-seed{seed}" for seed in (1, 2, 3)]
            tests = [records.read(name).get("test", {}).get("nDCG@10") for name in names]
            dev = ", ".join(f"{records.dev(name):.4f}" for name in names)
            test = ", ".join(f"{statistics.fmean(values):.4f}" if values else "–" for values in tests)
            assert f"| {results['settings']['titles'][run['method']]} | {dev} | {test} |" in text
            seconds += [record["seconds"] for record in map(records.read, names) if "H100" in record["machine"]["GPU"]]
    assert f"{teacher['seconds']} s for the teacher and {min(seconds)} to {max(seconds)} s for a student" in words
    assert f"({teacher['steps']:,} steps)" in words and "H100" in teacher["machine"]["GPU"]
    assert {len(system["seeds"]["nDCG@10"]) for system in results["systems"] if system["shape"] == "3/384"} == {3}


@pytest.mark.parametrize(("section", "name", "shape", "better"), [
    ("## One part changed at a time: the built-in", "example", "3/192",
     ["simplified-masked", "simplified-listwise"]),
    ("## One part changed at a time: WorldTree", "ablations", "3/384",
     ["simplified-masked", "without-hard", "without-soft", "simplified-listwise", "simplified-ensemble",
      "small-margin", "simplified"])])
def test_changes_to_the_proposed_method_are_reported_as_recorded(section, name, shape, better):
    text = (ROOT / "docs" / "replication.md").read_text().partition(section)[2].partition("<!--")[0]
    results, text = json.loads((RESULTS / f"{name}.json").read_text()), text.replace("−", "-")
    means = {system["name"]: statistics.fmean(system["seeds"]["nDCG@10"]) for system in results["systems"]}
    compared = results["comparisons"][f"{shape} simplified-masked"]["nDCG@10"]
    titles = {"simplified-listwise": "with the listwise loss", "simplified-margin": "with the margin loss, weight 1",
              "without-hard": "without hard labels", "without-soft": "without soft labels",
              "simplified": "with the original's padding", "small-margin": "with the margin loss, weight 0.03",
              "simplified-ensemble": "with the soft labels of three teachers"}
    for system, found in compared.items():
        low, high = found["interval"]
        p = "< 0.001" if (value := found["holm"]["t-test"]) < 0.001 else f"{value:.3f}"
        difference = f"{found['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        assert f"| {titles[system.partition(' ')[2]]} | {means[system]:.4f} | {difference} | {p} |" in text
    words = " ".join(text.split())
    assert f"BM25 has {means['BM25']:.4f}, the teacher {means['teacher']:.4f}, " in words
    assert f" {means[f'{shape} simplified-masked']:.4f}" in words
    found = [system for system, found in results["comparisons"]["BM25"]["nDCG@10"].items()
             if found["holm"]["t-test"] < 0.05]
    assert found == ["teacher", *(f"{shape} {method}" for method in better)]


def test_the_smaller_student_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().replace("−", "-")
    section = text.partition("## The smaller student")[2].partition("<!--")[0]
    results, records = json.loads((RESULTS / "small-student.json").read_text()), Records(RESULTS / "worldtree", {})
    systems = {system["name"]: system for system in results["systems"]}
    means = {name: statistics.fmean(system["seeds"]["nDCG@10"]) for name, system in systems.items()}
    kept = {}
    for method in ("simplified-masked", "tinybert", "standard"):
        cells = []
        for other in ("BM25", "teacher"):
            found = results["comparisons"][other]["nDCG@10"][f"2/192 {method}"]
            cells.append(f"{found['difference']:+.4f} ({' to '.join(f'{end:+.4f}' for end in found['interval'])})")
            assert found["difference"] < 0 and found["holm"]["t-test"] < 0.001
        mean = means[f"2/192 {method}"]
        kept[method] = f"{100 * mean / means['teacher']:.1f}"
        row = [results["settings"]["titles"][method], f"{mean:.4f}", kept[method], *cells]
        assert f"| {' | '.join(row)} |" in section
    words = " ".join(section.split())
    for found in results["comparisons"]["2/192 simplified-masked"]["nDCG@10"].values():
        assert f"{found['difference']:+.4f} ({' to '.join(f'{end:+.4f}' for end in found['interval'])})" in words
        assert found["difference"] > 0 and found["holm"]["t-test"] < 0.001
    larger = records.read("3-384-simplified-masked-0.0004-seed1")["dev"][0]["nDCG@10"]
    assert f"The student of 3/384, which starts from layers of MiniLM, has {larger:.4f} after one epoch." in words
    speed = f"{systems['2/192 tinybert']['speed_up']:.3g} times as fast"
    assert speed in words and f"{speed} as the teacher. On WorldTree, it keeps {kept['simplified-masked']} %" in \
        " ".join(text.split())


def test_the_longer_training_of_the_smaller_student_is_reported_as_recorded():
    words = " ".join((ROOT / "docs" / "replication.md").read_text().replace("−", "-").split())
    name = "2-192-simplified-masked-0.0004-seed1"
    long, short = (Records(RESULTS / directory, {}).read(name) for directory in ("worldtree-longer", "worldtree"))
    assert long["steps"] == 4 * short["steps"] and long["made_of"] == short["made_of"]
    *epochs, last = (f"{row['nDCG@10']:.4f}" for row in long["dev"])
    assert f"it has {', '.join(epochs)} and {last} after one to eight epochs." in words
    values = [record["test"]["nDCG@10"] for record in (long, short)]
    found = stats.ttest_rel(*values)
    low, high = found.confidence_interval()
    after, before = map(statistics.fmean, values)
    assert (f"reaches {after:.4f} instead of {before:.4f}. The difference is {after - before:+.4f} ({low:+.4f} to "
            f"{high:+.4f}), p = {found.pvalue:.3f}.") in words
    comparisons = json.loads((RESULTS / "longer.json").read_text())["comparisons"]
    found = comparisons["BM25"]["nDCG@10"]["2/192 simplified-masked"]
    interval = " to ".join(f"{end:+.4f}" for end in found["interval"])
    assert f"BM25: {found['difference']:+.4f} ({interval}), p = {found['holm']['t-test']:.3f}." in words


def test_the_ranking_of_documents_is_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text().replace("−", "-").partition("## Documents: MaxP")[2]
    words, results = " ".join(text.split()), json.loads((RESULTS / "squad" / "maxp.json").read_text())
    for system in results["systems"]:
        name = system["name"] + ", 3/384" * system["name"].startswith("Simplified")
        assert " | ".join([name, *(f"{value:.4f}" for value in system["averages"].values())]) in text
    found = [each for role in ("baseline", "teacher") for each in results["comparisons"][role]["nDCG@10"].values()]
    teacher, student, _, minus_teacher = [(f"{each['difference']:+.4f}", each["holm"]["t-test"]) for each in found]
    assert f"{teacher[0]}, p = {teacher[1]:.3f}" in words and minus_teacher[1] < 0.001
    assert f"({minus_teacher[0]}, p < 0.001) and than BM25 ({student[0]}, p = {student[1]:.3f})" in words
    assert f"{len(results['queries'])} of the test questions" in words
    student, teacher = (Records(RESULTS / "squad-sentences", {}).read(name) for name in (
        "3-384-simplified-masked-0.0002-seed1", "teacher-5e-05-seed1"))
    assert results["weights"] == {"teacher": teacher["also_made"][0]["sha256"], "student": student["sha256"]}
    assert student["made_of"]["teacher"] == results["weights"]["teacher"]


def test_progress_with_the_padding_of_the_original_is_reported_as_recorded():
    words = " ".join((ROOT / "docs" / "replication.md").read_text().split())
    records = Records(RESULTS / "worldtree", {})
    one, two = ([f"{row['nDCG@10']:.4f}" for row in records.read(f"3-384-{name}-0.0004-seed1")["dev"]]
                for name in ("simplified", "simplified-masked"))
    assert (f"it has {one[0]} after one epoch and {one[1]} after two, the unchanged method {two[0]} and "
            f"{two[1]}.") in words


def test_one_stage_and_margins_are_reported_as_recorded():
    text = (ROOT / "docs" / "replication.md").read_text()
    text = text.partition("## One part changed at a time: WorldTree")[2].partition("<!--")[0]
    words, records = " ".join(text.replace("−", "-").split()), Records(RESULTS / "worldtree", {})
    one_stage, two_stages = (records.read(f"3-384-{name}-seed1")["test"]["nDCG@10"]
                             for name in ("without-hard-0.0004", "tinybert-0.0001"))
    found = stats.ttest_rel(one_stage, two_stages)
    low, high = found.confidence_interval()
    assert f"TinyBERT has {statistics.fmean(two_stages):.4f} with this seed" in words
    assert (f"{statistics.fmean(one_stage) - statistics.fmean(two_stages):+.4f} ({low:+.4f} to {high:+.4f}), which is "
            f"not significant (p = {found.pvalue:.3f})") in words
    rows = records.read("3-384-simplified-margin-0.0004-seed1")["losses"]
    margin, attention, hard, soft = (statistics.median(row[f"{term}_grad"] for row in rows)
                                     for term in ("margin", "att", "hard", "soft"))
    assert (f"norm is {margin:.0f}. For attention, it is {attention:.1f}, for hard labels {hard:.1f}, for soft labels "
            f"{soft:.1f}.") in words
    rows = records.read("3-384-small-margin-0.0004-seed1")["losses"]
    assert f"has a norm of {0.03 * statistics.median(row['margin_grad'] for row in rows):.1f}." in words
    teacher = records.read("teacher-5e-05-seed1")
    assert records.read("3-384-without-hard-0.0004-seed1")["made_of"]["teacher"] == teacher["sha256"]


def test_a_document_without_the_markers(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"collection": "a", "settings": {"dev_depth": 1}, "tuned": [],
                                                 "curves": [], "dev": {"queries": 1, "nDCG@10": {"BM25": 0.5}}}))
    (tmp_path / "doc.md").write_text("<!-- b -->\n")
    done = run_script("experiments.findings", tmp_path / "a.json", "--output_dir", tmp_path, "--document",
                      tmp_path / "doc.md")
    assert done.returncode == 2 and "doc.md: " in done.stderr and "<!-- a -->" in done.stderr
    (tmp_path / "doc.md").write_text("x\n<!-- a -->\nold\n<!-- end of a -->\ny\n")
    for _ in range(2):
        run_script("experiments.findings", tmp_path / "a.json", "--output_dir", tmp_path, "--document",
                   tmp_path / "doc.md")
    assert re.fullmatch(r"x\n<!-- a -->\n\nOn the 1 dev queries(.|\n)*0\.5000(.|\n)*\n<!-- end of a -->\ny\n",
                        (tmp_path / "doc.md").read_text())


def test_a_summary_needs_its_measure_and_an_existing_directory(tmp_path):
    results = json.loads((RESULTS / "longer.json").read_text())
    results["settings"]["measures"] = ["RR@10"]
    (tmp_path / "a.json").write_text(json.dumps(results))
    command = ["experiments.findings", tmp_path / "a.json", "--output_dir", tmp_path / "out", "--summary"]
    done = run_script(*command, tmp_path / "summary.json")
    assert done.returncode == 2 and "the results for worldtree have no nDCG@10; add it" in done.stderr
    done = run_script(*command, tmp_path / "none" / "summary.json")
    assert done.returncode == 2 and "its directory does not exist" in done.stderr


def test_files_that_are_not_results(tmp_path):
    wrong = (("a.json", "{}", "'dev'"), ("b.json", "{", "results.json"), ("c.json", "[]", "holds a list"))
    for name, content, part in wrong:
        (tmp_path / name).write_text(content)
        done = run_script("experiments.findings", tmp_path / name, "--output_dir", tmp_path / "out")
        assert done.returncode == 2 and f"{name}: " in done.stderr and part in done.stderr
        assert "Traceback" not in done.stderr
