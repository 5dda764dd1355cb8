"""Golden figures of the original implementation and tiny models, as every test file needs them."""
import json
import locale
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file

from simplified_tinybert.common.processes import WHOLE
from simplified_tinybert.data import features
from simplified_tinybert.data.features import Examples, FeatureWriter
from simplified_tinybert.model.vocabulary import Vocabulary, bert_vocabulary
from simplified_tinybert.training.loop import Trainer
from simplified_tinybert.training.objective import ObjectiveSettings, mean_over, objective, total_loss

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
MODELS = ("teacher", "student_2x24", "student_4x48")

os.environ["HF_HUB_OFFLINE"] = "1"                     # no test may reach out
os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"                     # tiny models: more threads would only wait for each other
torch.set_num_threads(1)
if locale.getencoding().lower() not in ("utf-8", "utf8"):
    os.environ["PYTHONIOENCODING"] = "utf-8"            # what tests read is UTF-8, whatever the machine's locale is
for name in ("C.UTF-8", "en_US.UTF-8", "UTF-8"):
    with suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, name)
        break
settings.register_profile("patient", deadline=None)     # on a busy machine any example may take long
settings.load_profile("patient")


FIGURES = Counter()


@pytest.fixture
def figures() -> Counter:
    """What was tried and how often, for the summary at the end."""
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("reliability: what was tried")
        for what, count in FIGURES.items():
            terminalreporter.write_line(f"{count:6,}  {what}")


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((DATA / "losses.json").read_text())


@pytest.fixture(scope="session")
def golden_models(tmp_path_factory) -> dict[str, Path]:
    """The three golden models as Hugging Face directories with a vocabulary of 200 made-up pieces: w7 is id 7."""
    directories = {}
    for name in MODELS:
        directory = directories[name] = tmp_path_factory.mktemp("models") / name
        directory.mkdir()
        shutil.copyfile(DATA / f"{name}.safetensors", directory / "model.safetensors")
        shutil.copyfile(DATA / f"{name}.config.json", directory / "config.json")
        (directory / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    return directories


def single_logit(source: Path, target: Path, **settings: object) -> Path:
    """The model with the one logit z = the difference of its two, as most cross-encoders on the hub have it."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][1:] - weights[name][:1]
    save_file(weights, target / "model.safetensors")
    return change_config(target, num_labels=1, id2label={"0": "LABEL_0"}, **settings)


def change_config(directory: Path, **changes: object) -> Path:
    """The directory, with other settings in its config.json."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tiny_vocabulary() -> list[str]:
    pieces = [f"w{number}" for number in range(200)]
    for number, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]):
        pieces[number] = piece
    return pieces


def words(ids: list[int]) -> str:
    """A text that tokenizes to these ids of the tiny vocabulary."""
    return " ".join(f"w{number}" for number in ids)


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script of the root (`report.py`), or a program below it by its module (`experiments.findings`)."""
    return subprocess.run([sys.executable, *program(name), *map(str, arguments)], capture_output=True, text=True,
                          timeout=900, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})


def program(name: str) -> list[str]:
    """What follows `python` on the command line of `run_script`."""
    return [str(ROOT / name)] if name.endswith(".py") else ["-m", name]


def write_features(path: Path, rows: list[tuple], max_seq_length: int = 32, set_name: str = "train") -> Path:
    """A feature file of (id, token ids, length of the query segment, label) rows in the tiny vocabulary."""
    with open(path, "wb") as handle:
        writer = FeatureWriter(handle, set_name, max_seq_length, vocabulary())
        for start in range(0, len(rows), features.CHUNK_EXAMPLES):
            ids, tokens, query_lengths, labels = zip(*rows[start:start + features.CHUNK_EXAMPLES])
            writer.write(Examples(np.concatenate(tokens).astype(np.uint16),
                                  np.array([len(row) for row in tokens], np.uint16),
                                  np.array(query_lengths, np.uint16), np.array(labels, np.int8), list(ids)))
        writer.close()
    return path


def vocabulary() -> Vocabulary:
    return bert_vocabulary({piece: number for number, piece in enumerate(tiny_vocabulary())}, lower_case=True)


def random_rows(count: int, max_seq_length: int = 32, seed: int = 0) -> list[tuple]:
    """Pairs of random words; ids have the form query_id#passage_id, labels alternate."""
    random, rows = np.random.default_rng(seed), []
    for number in range(count):
        length = int(random.integers(5, max_seq_length + 1))
        tokens = random.integers(5, 200, length)
        query_length = int(random.integers(3, length - 1))
        tokens[0], tokens[query_length - 1], tokens[-1] = 2, 3, 3
        rows.append((f"q{number // 10}#D{number % 10}_{number}", tokens, query_length, number % 2))
    return rows


def loss_terms(student, teacher, batch, weights, share=WHOLE, **settings) -> dict[str, torch.Tensor]:
    """The loss of a batch and its parts, as the training loop adds them up."""
    chosen = ObjectiveSettings(weights=weights, **settings)
    terms = {name: value * share.of(mean_over(name, chosen.padding))
             for name, value in objective(student, teacher, batch, chosen).items()}
    return total_loss(terms, weights)


@pytest.fixture
def interrupted(monkeypatch):
    """Context in which a training is interrupted, as by Ctrl-C, after some steps."""
    @contextmanager
    def context(stop_after: int) -> Iterator[None]:
        steps, real_step = [], Trainer._step

        def step_until_interrupted(self, number, group):
            if len(steps) == stop_after:
                raise KeyboardInterrupt
            steps.append(number)
            real_step(self, number, group)
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_step", step_until_interrupted)
            with pytest.raises(KeyboardInterrupt):
                yield
    return context


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run a script's main in this process; returns its stderr. A UserError comes through as an exception."""
    def run(script, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()
        return capsys.readouterr().err
    return run
