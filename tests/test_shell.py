"""Shell scripts from any directory with a user's data, and the commands in the documentation."""
import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, random_rows, words
from torch.distributed.run import get_args_parser as torchrun_options

import convert_to_trec_results
from simplified_tinybert.checks.shell import check_variables
from simplified_tinybert.common.files import Problems

SCRIPTS = ("distill.sh", "reranker.sh", "collection.sh", "test.sh")
COMMANDS = ("prepare_examples.py", "tokenize_to_features.py", "general_distill.py", "distill.py", "reranker.py",
            "convert_to_trec_results.py", "msmarco_mrr_eval.py", "report.py", "convert_tf_checkpoint.py")
PAGES = ["README.md", "benchmarks/README.md", "examples/README.md",
         *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def bash(script, *arguments, cwd, **environment):
    return subprocess.run(["bash", str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=900, env=os.environ | {"PYTHON": sys.executable} | environment)


@pytest.mark.parametrize("name", [*SCRIPTS, "ditill.sh", "python_env.sh", ".ci/run"])
def test_shell_scripts_are_clean(name):
    content = (ROOT / name).read_bytes()
    assert b"\r" not in content                                   # as in the original: "command not found"
    assert subprocess.run(["bash", "-n", ROOT / name]).returncode == 0
    if name in SCRIPTS:
        assert content.startswith(b"#!/usr/bin/env bash\n") and b"\nset -euo pipefail\n" in content
        assert os.access(ROOT / name, os.X_OK)


@pytest.fixture
def own_data(golden_models, tmp_path):
    """A user's directory with models, training examples, test pairs and judgements."""
    for name, directory in golden_models.items():
        shutil.copytree(directory, tmp_path / "my models" / name)
    rows = [(row[0], words(row[1][1:row[2] - 1]), words(row[1][row[2]:-1]), row[3]) for row in random_rows(40)]
    (tmp_path / "train.tsv").write_text("".join(f"{n}\t{q}\t{p}\t{y}\n" for n, (_, q, p, y) in enumerate(rows)))
    (tmp_path / "pairs.tsv").write_text("".join(f"{i}\t{q}\t{p}\n" for i, q, p, _ in rows))
    (tmp_path / "qrels.txt").write_text("".join(f"q{number} 0 D1 1\n" for number in range(4)))
    return tmp_path


def test_distill_and_rerank_own_data_from_any_directory(own_data):
    done = bash("ditill.sh", "--warmup_proportion", "0.2", cwd=own_data, TEACHER_MODEL="my models/teacher",
                STUDENT_MODEL="my models/student_2x24", TRAIN_EXAMPLES="train.tsv", OUTPUT_STUDENT_DIR="out put",
                MAX_SEQ_LENGTH="32", DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    assert "2 epochs × 1 steps of 64 × 1 examples" in done.stderr
    done = bash("reranker.sh", "--score", "log_odds", cwd=own_data, MODEL_DIR="out put", TEST_PAIRS="pairs.tsv",
                OUTPUT_DIR="results", QRELS_FILE="qrels.txt", MAX_SEQ_LENGTH="32", DEVICE="cpu", MEASURES="nDCG@10 R@5")
    assert done.returncode == 0, done.stderr
    assert re.search(r"query_num: 4\nMRR: [\d.]+\nMRR@10: [\d.]+\nMRR@100: [\d.]+\nnDCG@10: [\d.]+\nR@5: ", done.stdout)
    assert len((own_data / "results" / "scores.tsv").read_text().splitlines()) == 40
    assert sorted(path.name for path in own_data.iterdir()) == [
        "cache", "my models", "out put", "pairs.tsv", "qrels.txt", "results", "train.tsv", "train.tsv.pkl",
        "train.tsv.pkl.run.json"]


@pytest.mark.slow
def test_several_processes_by_a_variable(own_data):
    models = {"TEACHER_MODEL": "my models/teacher", "STUDENT_MODEL": "my models/student_2x24", "DEVICE": "cpu"}
    done = bash("distill.sh", cwd=own_data, TRAIN_EXAMPLES="train.tsv", MAX_SEQ_LENGTH="32", PROCESSES="2",
                OUTPUT_STUDENT_DIR="out put", **models)
    assert done.returncode == 0 and "processes    2, " in done.stderr, done.stderr
    for processes in "21":
        done = bash("reranker.sh", cwd=own_data, MODEL_DIR="out put", TEST_PAIRS="pairs.tsv", OUTPUT_DIR=processes,
                    MAX_SEQ_LENGTH="32", DEVICE="cpu", PROCESSES=processes)
        assert done.returncode == 0, done.stderr
    assert (own_data / "2" / "scores.tsv").read_bytes() == (own_data / "1" / "scores.tsv").read_bytes()


def test_reranking_before_distilling_names_the_missing_step(tmp_path):
    done = bash("reranker.sh", cwd=tmp_path, EXAMPLE_DIR=str(tmp_path / "none"))
    assert done.returncode == 2 and "bash distill.sh" in done.stderr


@pytest.mark.parametrize("script, environment, message", [
    ("reranker.sh", {"AGGREGATION": "MinP"}, "AGGREGATION=MinP: expected MaxP"),
    ("reranker.sh", {"QRELS_FILE": "none.txt"}, "none.txt: cannot read the judgements (QRELS_FILE)"),
    ("reranker.sh", {"FEATURES_FILE": "test.pkl"}, "set MODEL_DIR"),
    ("distill.sh", {"FEATURES_FILE": "train.pkl"}, "set STUDENT_MODEL"),
    ("distill.sh", {"FEATURES_FILE": "train.pkl", "STUDENT_MODEL": "s"}, "set TEACHER_MODEL"),
    ("distill.sh", {"PROCESSES": "all"}, "PROCESSES=all: expected an integer"),
    ("reranker.sh", {"PROCESSES": "0"}, "PROCESSES=0: expected an integer"),
    ("reranker.sh", {"AGGREGATION": "1x-Max_and_AvgP"}, "AGGREGATION=1x-Max_and_AvgP: expected MaxP"),
    ("reranker.sh", {"COMPLETE": "maybe"}, "COMPLETE=maybe: expected 1, yes or true"),
    ("distill.sh", {"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not an interpreter"),
])
def test_wrong_variables_are_errors_at_the_start(tmp_path, script, environment, message):
    done = bash(script, cwd=tmp_path, **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr


def errors(**variables):
    problems = Problems()
    check_variables(variables, problems)
    return problems.messages


@pytest.mark.parametrize("name, valid, invalid", [
    ("AGGREGATION", ["MaxP", "FirstP", "SumP", "AvgP", "3-Max&AvgP", "12-Max_and_AvgP"],
     ["", "maxp", "0-Max&AvgP", "1x-Max_and_AvgP", "-Max&AvgP", "1-MaxAvgP", "MaxP AvgP"]),
    ("COMPLETE", ["", "0", "1", "no", "No", "YES", "yes", "true", "False"],
     ["2", "y", "on", "-1", " ", "01", "yes no"]),
    ("PROCESSES", ["1", "16"], ["", "0", "08", "-1", "1e3", "1.0", "two", "1 2", "١"]),
    ("MAX_SEQ_LENGTH", ["8", "256"], ["7", "65536", "1e3", "128 "]),
    ("LEARNING_RATE", ["5e-5", "0", ".1", "1"], ["", "-1", "nan", "inf", "fast", "1_0", "1e400"]),
    ("NUM_TRAIN_EPOCHS", ["1", "0.5", "2e0"], ["0", "-1", "", "nan"]),
    ("DEVICE", ["auto", "cpu", "cuda", "cuda:1", "0"], ["gpu", "", "cuda:", "-1", "0 1"]),
    ("MEASURES", ["nDCG@10 AP", "nDCG@10\n AP(rel=2)@100"], [" ", "nDCG@x", "XY", "ERR"]),
    ("OUTPUT_DIR", ["results", "", "a b"], ["-out"])])
def test_each_setting_has_a_rule(name, valid, invalid):
    for value in valid:
        assert errors(**{name: value}) == [], value
    for value in invalid:
        message, = errors(**{name: value})
        assert name in message and value in message or name == "MEASURES" and value.strip() in message


def test_rules_of_the_scripts_and_of_the_shell_agree():
    """AGGREGATION has the same rule as --aggregation."""
    for value in ("MaxP", "1-Max&AvgP", "01-Max&AvgP", "1x-Max_and_AvgP", "9" * 30 + "-Max&AvgP", "\n1-Max&AvgP", "M"):
        try:
            convert_to_trec_results.parse_aggregation(value)
        except argparse.ArgumentTypeError:
            assert errors(AGGREGATION=value)
        else:
            assert not errors(AGGREGATION=value)


@pytest.mark.parametrize("value, meaning", [("", "no"), ("0", "no"), ("no", "no"), ("FALSE", "no"), ("1", "yes"),
                                            ("Yes", "yes"), ("true", "yes"), ("TRUE", "yes")])
def test_yes_and_no(value, meaning):
    script = f'source "{ROOT}/python_env.sh"; if is_yes "$1"; then echo yes; else echo no; fi'
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script, "bash", value], capture_output=True, text=True,
                          timeout=60)
    assert done.stdout == meaning + "\n"


def test_files_needed_last_are_read_first(tmp_path):
    (tmp_path / "qrels").write_text("q1 0 D1 1\nq1 0 D2 7\n")
    (tmp_path / "run").write_text("q1 Q0 D1 1 t\n")
    two = errors(QRELS_FILE=str(tmp_path / "qrels"), RUN_FILE=str(tmp_path / "run"), MEASURES="ERR@10")
    assert [re.sub(r".*/(\w+:\d+): found (grade \d|\d columns).*", r"\1 \2", line) for line in two] == [
        "qrels:2 grade 7", "run:1 5 columns"]
    assert "no-such: cannot read the pairs (TEST_PAIRS)" in errors(TEST_PAIRS="no-such")[0]


def test_wrong_settings_create_no_files(own_data):
    """All errors are reported at once, including those of distill.py and reranker.py."""
    before = sorted(own_data.iterdir())
    done = bash("distill.sh", "--warmup_proportion", "2", cwd=own_data, TRAIN_EXAMPLES="train.tsv",
                TEACHER_MODEL="none", STUDENT_MODEL="my models/student_2x24", NUM_TRAIN_EPOCHS="0",
                LEARNING_RATE="fast", MAX_SEQ_LENGTH="256")
    assert done.returncode == 2 and sorted(own_data.iterdir()) == before
    for message in ("NUM_TRAIN_EPOCHS=0", "LEARNING_RATE=fast", "none: ", "--warmup_proportion 2.0", "64 positions"):
        assert message in done.stderr, done.stderr
    done = bash("reranker.sh", "--bf17", cwd=own_data, MODEL_DIR="my models/student_2x24", TEST_PAIRS="pairs.tsv",
                QRELS_FILE="qrels.txt", MEASURES="nDCG@10 nDGC@5", AGGREGATION="1x-Max_and_AvgP", COMPLETE="maybe")
    assert done.returncode == 2 and sorted(own_data.iterdir()) == before
    for message in ("AGGREGATION=1x-Max_and_AvgP", "COMPLETE=maybe", "--measures nDGC@5", "reranker.py: ", "--bf17"):
        assert message in done.stderr, done.stderr


@pytest.mark.parametrize(("batch_size", "refused"), [("32", True), ("96", False)])
def test_flags_are_checked_with_the_batch_size_of_the_variable(own_data, batch_size, refused):
    done = bash("distill.sh", "--group_by_query", "48", cwd=own_data, TRAIN_EXAMPLES="train.tsv", TEACHER_MODEL="none",
                STUDENT_MODEL="my models/student_2x24", TRAIN_BATCH_SIZE=batch_size, NUM_TRAIN_EPOCHS="0")
    assert done.returncode == 2 and "NUM_TRAIN_EPOCHS=0" in done.stderr
    assert ("--group_by_query 48: expected 2 to --train_batch_size" in done.stderr) == refused, done.stderr


@pytest.mark.slow
def test_complete_is_off_unless_set_to_yes(own_data):
    with open(own_data / "qrels.txt", "a") as handle:
        handle.write("q9 0 D1 1\n")
    for value, queries in (("0", 4), ("True", 5)):
        done = bash("reranker.sh", cwd=own_data, MODEL_DIR="my models/student_2x24", TEST_PAIRS="pairs.tsv",
                    OUTPUT_DIR="results", QRELS_FILE="qrels.txt", MAX_SEQ_LENGTH="32", DEVICE="cpu", COMPLETE=value)
        assert done.returncode == 0 and f"query_num: {queries}\n" in done.stdout, done.stderr


@pytest.mark.parametrize("script", ["distill.sh", "ditill.sh", "reranker.sh"])
def test_shell_scripts_explain_their_variables(tmp_path, script):
    done = bash(script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    used = set(re.findall(r"\$\{([A-Z][A-Z_]+):-", (ROOT / script.replace("ditill", "distill")).read_text()))
    assert used and all(name in done.stdout for name in used)


@pytest.mark.slow
def test_features_shorter_than_256_need_no_flag(own_data):
    """Features of 32 tokens and models with 64 positions work with the defaults."""
    models = {"TEACHER_MODEL": "my models/teacher", "STUDENT_MODEL": "my models/student_2x24", "DEVICE": "cpu"}
    done = bash("distill.sh", cwd=own_data, TRAIN_EXAMPLES="train.tsv", FEATURES_FILE="train.pkl", MAX_SEQ_LENGTH="32",
                OUTPUT_STUDENT_DIR="one", **models)
    assert done.returncode == 0, done.stderr
    done = bash("distill.sh", cwd=own_data, FEATURES_FILE="train.pkl", OUTPUT_STUDENT_DIR="two", **models)
    assert done.returncode == 0, done.stderr
    done = bash("distill.sh", cwd=own_data, FEATURES_FILE="train.pkl", OUTPUT_STUDENT_DIR="three", MAX_SEQ_LENGTH="256",
                **models)
    assert done.returncode == 2 and "64 positions" in done.stderr


def test_a_failing_step_ends_the_script(own_data):
    (own_data / "train.tsv").write_text("1\tonly two columns\n")
    done = bash("distill.sh", cwd=own_data, TEACHER_MODEL="my models/teacher", STUDENT_MODEL="my models/student_2x24",
                TRAIN_EXAMPLES="train.tsv", OUTPUT_STUDENT_DIR="out", MAX_SEQ_LENGTH="32")
    assert done.returncode == 2 and "train.tsv:1: found 2 tab-separated columns" in done.stderr
    assert not (own_data / "out").exists()


def test_an_environment_must_have_the_pinned_packages(tmp_path):
    (tmp_path / "python_env.sh").write_bytes((ROOT / "python_env.sh").read_bytes())
    script = f'source "{tmp_path}/python_env.sh"; satisfies "{sys.executable}" "$1" && echo yes || echo no'

    def answer(text):
        (tmp_path / "needs.txt").write_text(text)
        return subprocess.run(["bash", "-c", script, "bash", tmp_path / "needs.txt"], capture_output=True,
                              text=True).stdout.strip()
    import numpy
    assert answer(f"# comment\nnumpy=={numpy.__version__}\n") == "yes"
    assert answer("numpy==1.0.0\n") == "no"
    assert answer("no-such-package==1.0.0\n") == "no"
    assert answer('numpy==1.0.0; python_version < "3"\n') == "yes"      # not for this environment
    assert answer('numpy==1.0.0; python_version > "3"\n') == "no"
    (tmp_path / "more.txt").write_text("numpy==1.0.0\n")
    assert answer("-r more.txt\n") == "no"


def test_requirements_are_pinned_and_shared_with_conda():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            assert line.startswith(("#", "-r ")) or re.fullmatch(r"[A-Za-z0-9_-]+==[\w.]+(; .*)?", line), line
    assert "- -r requirements.txt" in (ROOT / "env.yaml").read_text()


@pytest.fixture(scope="module")
def help_texts():
    return {name: subprocess.run([sys.executable, ROOT / name, "--help"], capture_output=True, text=True,
                                 check=True).stdout for name in COMMANDS}


def test_every_script_explains_itself(help_texts):
    for name, text in help_texts.items():
        assert f"python {name}" in text and "default" in text, name


@pytest.mark.parametrize("page", ["README.md", "docs/objectives.md", "docs/multi-gpu.md", "docs/differences.md"])
def test_every_flag_of_a_page_exists(page, help_texts):
    text = re.sub(r"^(#SBATCH|srun) .*$", "", (ROOT / page).read_text(), flags=re.MULTILINE)
    flags = set(re.findall(r"--[a-z][a-z_0-9]+", text)) - {"--help"}
    known = set(re.findall(r"--[a-z][a-z_0-9]+", " ".join([*help_texts.values(), torchrun_options().format_help()])))
    assert flags and flags <= known, flags - known


def command_lines(page):
    """Yield (script, arguments) of every command in a document; in a `for` loop, for each value."""
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / page).read_text())
    loops = {name: values.split() for name, values in re.findall(r"for (\w+) in ([^;\n]+); do", text)}
    for script, arguments in re.findall(r"(?:\bpython|\btorchrun\b[^`\n]*?) ([\w/]+\.py)\b([^`\n;|]*)", text):
        typed = {arguments}
        for name, values in loops.items():
            typed = {line.replace(f"${name}", value) for line in typed for value in values}
        yield from ((script, line) for line in sorted(typed))


def test_the_pages_hold_commands():
    assert sum(len(list(command_lines(page))) for page in PAGES) > 40
    assert len(list(command_lines("docs/msmarco.md"))) > 10


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_valid(page, help_texts, monkeypatch, capsys):
    for script, arguments in command_lines(page):
        unknown = set(re.findall(r"--[a-z]\w+", arguments)) - set(re.findall(r"--[a-z]\w+", help_texts[script]))
        assert not unknown, f"{script}{arguments}"
        if "…" in arguments or "..." in arguments:
            continue
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments, comments=True)])
        try:
            importlib.import_module(script.removesuffix(".py")).parse_args()
        except SystemExit:
            pytest.fail(f"{script}{arguments}: {capsys.readouterr().err.splitlines()[-1]}")


@pytest.mark.parametrize("block", [block for page in PAGES for block in re.findall(
    r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)])
def test_blocks_to_paste_are_shell(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_every_started_module_exists(page):
    for module in re.findall(r"python -m ((?:benchmarks|examples|experiments)[\w.]*)", (ROOT / page).read_text()):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    for target in targets:
        assert (ROOT / page).parent.joinpath(target).exists(), target
