"""The benchmarks: the baselines compute what the original computes, and each command writes its files."""
import json
import re
import statistics
import subprocess
import sys
from argparse import Namespace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, random_rows, run_script, write_features
from helpers.golden import golden_name

from benchmarks import common, original, original_tokenizer, ours, samples
from simplified_tinybert.data.features import read_chunks
from simplified_tinybert.model.pretrained import load_cross_encoder, read_config, save_cross_encoder
from simplified_tinybert.ranking.presentation import number
from simplified_tinybert.training.optimizer import linear_warmup_decay

VOCABULARY = DATA / "bert-base-uncased-vocab.txt"
SIMPLIFIED = (2, 3, 6, 7)          # cases whose head is classifier(pooled), like the baseline's


@pytest.fixture(scope="module")
def directories(golden_models, tmp_path_factory):
    """The golden models as this repository writes them, with the projection in a separate file."""
    saved = {}
    for name, directory in golden_models.items():
        saved[name] = tmp_path_factory.mktemp("saved") / name
        save_cross_encoder(load_cross_encoder(directory)[0], saved[name], directory, lower_case=True)
    return saved


@pytest.mark.parametrize("name", ["teacher", "student_2x24", "student_4x48"])
def test_the_baseline_scores_like_the_original_and_reranker_py(golden, directories, batch, tmp_path, name):
    model = original.OriginalBert(directories[name]).eval()
    expected = golden["rerank"][name]["relevance_probability"]
    assert original.original_scores(model, [batch]).tolist() == pytest.approx(expected, abs=1e-6)
    chunk, = read_chunks(write_features(tmp_path / "test.pkl", random_rows(50), set_name="test"))
    padded = [chunk.batch(np.arange(start, start + 25), 32) for start in (0, 25)]
    scores = ours.score(ours.load_scorer(directories[name], torch.device("cpu")), chunk)
    np.testing.assert_allclose(original.original_scores(model, padded), scores, rtol=0, atol=1e-6)
    assert scores.std() > 1e-3


@pytest.mark.parametrize("number", SIMPLIFIED)
def test_the_baseline_trains_like_the_original(golden, directories, batch, number):
    """Losses, gradients and six steps in double precision equal the original's recorded figures."""
    case = golden["cases"][number]
    assert case["head"] == "bert"
    student = original.OriginalBert(directories[case["student"]]).double()
    teacher = original.OriginalBert(directories["teacher"]).double()
    training, losses = case["training"], []
    optimizer = original.OriginalAdam(student, training["learning_rate"], lambda step: linear_warmup_decay(
        step, training["t_total"], training["warmup_proportion"]), training["weight_decay"])
    for step in range(6):
        terms = original.original_losses(student, teacher, batch, case["temperature"])
        losses.append(terms["loss"].item())
        terms["loss"].backward()
        if step == 0:
            parameters = {name.removeprefix("model."): parameter for name, parameter in student.named_parameters()}
            assert terms["att_loss"].item() == pytest.approx(case["losses"]["attention"], rel=1e-6)
            assert terms["rep_loss"].item() == pytest.approx(case["losses"]["hidden"], rel=1e-6)
            for name, norm in case["grad_norm"].items():
                assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-6, abs=1e-12), name
        optimizer.step()
        optimizer.zero_grad()
    assert losses == pytest.approx(training["total_loss_per_step"], rel=1e-6)
    norms = {name.removeprefix("model."): parameter.norm().item() for name, parameter in student.named_parameters()}
    assert norms == pytest.approx(training["parameter_norm_after"], rel=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_our_steps_change_the_student_like_the_baselines(directories, batch):
    old, teacher = (original.OriginalBert(directories[name]).double() for name in ("student_2x24", "teacher"))
    step = original.OriginalAdam(old, 1e-3, lambda step: 1.0)
    student, new_teacher = (ours.load_model(directories[name], torch.device("cpu")).double()
                            for name in ("student_2x24", "teacher"))
    new_step = ours.Step(student, new_teacher, "reference", rate=1e-3)
    for _ in range(3):
        original.original_losses(old, teacher, batch)["loss"].backward()
        step.step()
        step.zero_grad()
        new_step(batch)
    expected = {name.removeprefix("model."): parameter for name, parameter in old.named_parameters()}
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, expected[golden_name(name)], rtol=1e-6, atol=1e-9)


def test_the_baseline_tokenizes_like_the_original():
    tokens = {token: number for number, token in enumerate(VOCABULARY.read_text(encoding="utf-8").split("\n")) if token}
    for case in json.loads((DATA / "tokenization.json").read_text(encoding="utf-8")):
        length = case["max_seq_length"]
        ids, mask, segments = original_tokenizer.features(case["query"], case["passage"], tokens, length)
        padding = [0] * (length - case["length"])
        assert (ids, segments) == (case["input_ids"] + padding, case["token_type_ids"] + padding), case["query"]
        assert mask == [1] * case["length"] + padding


def test_operations_of_a_forward_pass(directories):
    """The count equals PyTorch's for the matrix products of one pair without padding."""
    from torch.utils.flop_counter import FlopCounterMode
    config, length = read_config(directories["student_4x48"]), 20
    tokens = torch.randint(5, 100, (1, length))
    pair = ours.Batch(tokens, torch.zeros_like(tokens), torch.ones_like(tokens), has_padding=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        original.OriginalBert(directories["student_4x48"]).eval()(pair)
    assert common.forward_flops(config, [length], cls_only=False) == counter.get_total_flops()
    assert 0.6 < common.forward_flops(config, [length]) / common.forward_flops(config, [length], cls_only=False) < 0.9


@pytest.fixture(scope="module")
def texts():
    return samples.Texts()


def test_pairs_repeat_passages_as_often_as_requested(texts):
    rows = [line.split("\t") for line in texts.pair_lines(1000, repeats=4)]
    assert len({row[0] for row in rows}) == 1000 and len({row[1] for row in rows}) == 10
    assert 200 < len({row[2] for row in rows}) <= 250
    passages = [line.split("\t")[2] for line, _ in zip(texts.training_lines(), range(1000))]
    assert len(set(passages)) > 990


def test_ratio():
    assert common.ratio([4.0, 6.0, 9.0], [2.0, 2.0, 2.0]) == "3.00 × (2.00 – 4.50)"


@pytest.mark.slow
def test_tokenization_runs_and_writes_its_files(texts, tmp_path):
    samples.write_lines(tmp_path / "pairs.tsv", texts.pair_lines(400, repeats=1))
    done = run_script("benchmarks.tokenization", "--quick", "--raw_data_file", tmp_path / "pairs.tsv", "--output_dir",
                      tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tokenization.md").read_text(encoding="utf-8") == done.stdout[:-1]
    measured = json.loads((tmp_path / "tokenization.json").read_text())
    assert measured["test"]["different"] == 0 and measured["test"]["ways"]["ours"]["pairs"] == 300
    assert (tmp_path / "tokenization.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_each_command_runs_and_writes_its_files(texts, tmp_path):
    pairs, examples = tmp_path / "pairs.tsv", tmp_path / "examples.tsv"
    samples.write_lines(pairs, texts.pair_lines(100, repeats=1))
    samples.write_lines(examples, islice(texts.training_lines(), 40))
    flags = {"reranking": ["--raw_data_file", pairs], "distillation": ["--raw_data_file", examples, "--bf16"],
             "tokenization": ["--kinds", "re-ranking"]}
    running = {name: subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--device", "cpu", "--output_dir", tmp_path,
         *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for name, more in flags.items()}
    for name, process in running.items():
        try:
            output, errors = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            for other in running.values():
                other.kill()
            raise
        assert process.returncode == 0, errors[-3000:]
        assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == output[:-1] and "CPU: " in output
        if name != "tokenization":
            packs = common.why_not_packed(torch.bfloat16) is None
            assert f"bf16: {'yes' if packs else 'no ('}" in output and "weights packed by oneDNN: " in output
        assert json.loads((tmp_path / f"{name}.json").read_text())["arguments"]["quick"]
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    differences = json.loads((tmp_path / "reranking.json").read_text())["ways"]["1x48"]["difference"]
    exact = [value for way, value in differences.items() if not way.endswith(("bf16", "int8"))]
    assert max(exact) < 1e-4                            # random weights, whose logits are scaled up
    steps = json.loads((tmp_path / "distillation.json").read_text())["steps"]["1x24"]
    assert steps["loss_difference"] < 1e-5
    assert json.loads((tmp_path / "tokenization.json").read_text())["re-ranking"]["different"] == 0


BACKENDS = [("sentence-transformers, ONNX", "sentence-transformers, OpenVINO"),
            ("sentence-transformers, ONNX int8", "sentence-transformers, OpenVINO int8")]
MEASURED = {"the original's method": ["original"], "sentence-transformers": ["sentence-transformers"],
            "its fastest backend, float32": BACKENDS[0], "its fastest backend, int8": BACKENDS[1],
            "`reranker.py`": ["ours"], "`reranker.py`, with tokenization": ["ours, from texts"],
            "`reranker.py --int8`": ["ours, int8"]}


@pytest.mark.parametrize(("page", "start", "shapes"), [
    ("README.md", "| re-ranking, pairs/s |", ("3x384", "12x768")),
    ("benchmarks/README.md", "| | 3/384 | 6/768 | 12/768 |", ("3x384", "6x768", "12x768"))])
def test_the_speeds_of_the_pages_are_those_of_the_results(page, start, shapes):
    measured = json.loads((ROOT / "benchmarks" / "results" / "reranking.json").read_text(encoding="utf-8"))["ways"]
    rows = (ROOT / page).read_text(encoding="utf-8").partition(start)[2].partition("\n\n")[0].splitlines()[2:]
    table = {name.removesuffix(": ONNX"): cells for name, *cells in (row.strip("| ").split(" | ") for row in rows)}
    assert list(table) == list(MEASURED)
    for name, cells in table.items():
        rates = []
        for shape, cell in zip(shapes, cells):
            times = measured[shape]["times"]
            way = min(MEASURED[name], key=lambda way: statistics.median(times[way]))  # noqa: B023
            rates.append(measured[shape]["pairs"] / statistics.median(times[way]))
            correlation = f"{measured[shape]['correlation'][way]:.3f}"
            assert cell.partition(" (")[0] == number(rates[-1])
            assert cell.partition(" (")[2] in ("", f"{correlation})", f"{way.rpartition(', ')[2]})"), cell
        assert len(cells) == len(shapes) or cells[-1] == f"{rates[0] / rates[-1]:.1f} ×"


def test_records_name_no_directory_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/ours.py", "--output_dir", str(tmp_path), "--pairs", "3"])
    args = Namespace(output_dir=tmp_path / "out", vocab_file=VOCABULARY, python=tmp_path / "bin" / "python", pairs=3)
    common.write_results("Title", {"CPU": "x"}, [], args, {})
    record = json.loads((tmp_path / "out" / "ours.json").read_text())
    assert record["arguments"] == {"output_dir": "out", "python": "python", "pairs": 3,
                                   "vocab_file": "tests/data/bert-base-uncased-vocab.txt"}
    table = (tmp_path / "out" / "ours.md").read_text()
    assert f"`python -m benchmarks.ours --output_dir {tmp_path.name} --pairs 3`" in table
    for directory in ("benchmarks/results", "experiments/results"):
        for path in (ROOT / directory).rglob("*.*"):
            assert path.suffix == ".png" or not re.search(r'["` ]/\w', path.read_text(encoding="utf-8")), path


TITLES = {"original": "the original's method", "sentence-transformers": "sentence-transformers",
          "sentence-transformers, bf16": "sentence-transformers, bf16", "ours": "`reranker.py`",
          "ours, bf16": "`reranker.py --bf16`"}


@pytest.mark.parametrize(("directory", "ways"), [
    ("xeon", TITLES | {"ours, from texts": "`reranker.py`, with tokenization", "ours, int8": "`reranker.py --int8`"}),
    ("h100", TITLES | {"ours, from texts": "`reranker.py`, with tokenization in one process"})])
def test_the_page_has_the_medians_of_other_machines(directory, ways):
    heading = {"xeon": "## On a CPU with AVX-512", "h100": "## On a GPU"}[directory]
    text = (ROOT / "benchmarks" / "README.md").read_text().partition(heading)[2].partition("## ")[0]
    results = ROOT / "benchmarks" / "results" / directory
    measured = json.loads((results / "reranking.json").read_text())["ways"]
    for way, title in ways.items():
        cells = []
        for found in measured.values():
            cell = number(found["pairs"] / statistics.median(found["times"][way]))
            inexact = directory == "xeon" and ("bf16" in way or "int8" in way)
            cells.append(cell + f" ({found['correlation'][way]:.3f})" * inexact)
        assert f"| {title} | {' | '.join(cells)} |" in text
    if directory == "h100":
        steps, = json.loads((results / "distillation.json").read_text())["steps"].values()
        for way, title in (("original", "the original's step, float32"), ("ours", "`distill.py`"),
                           ("ours, masked", "`distill.py --padding masked`"),
                           ("ours, bf16", "`distill.py --bf16`"),
                           ("ours, masked, bf16", "`distill.py --bf16 --padding masked`")):
            own = [1000 * steps["batch_size"] * spent for spent in steps["times"][way]]
            ratios = [1000 * steps["batch_size"] * old / new for old, new in zip(steps["times"]["original"], own)]
            cells = [f"{statistics.median(own):.1f}", f"{statistics.median(ratios):.2f}"]
            if "bf16" in way:
                cells = [f"{cells[0]} ({min(own):.1f} – {max(own):.1f})",
                         f"{cells[1]} ({min(ratios):.2f} – {max(ratios):.2f})"]
            assert f"| {title} | {' | '.join(cells)} |" in text
