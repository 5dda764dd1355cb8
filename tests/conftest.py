"""Golden values of the original implementation, tiny models and features, shared by the test files."""
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

from simplified_tinybert.common.processes import FULL_BATCH
from simplified_tinybert.data import features
from simplified_tinybert.data.features import Examples, FeatureWriter
from simplified_tinybert.model.batch import Batch
from simplified_tinybert.tokenization.vocabulary import Vocabulary, bert_vocabulary
from simplified_tinybert.training.objective import ObjectiveSettings, mean_over, objective, total_loss
from simplified_tinybert.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
MODELS = ("teacher", "student_2x24", "student_4x48")

os.environ["HF_HUB_OFFLINE"] = "1"                      # tests use no network
os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"                     # with tiny models, more threads are slower
torch.set_num_threads(1)
if locale.getencoding().lower() not in ("utf-8", "utf8"):
    os.environ["PYTHONIOENCODING"] = "utf-8"            # scripts print UTF-8 to the tests, in any locale
for name in ("C.UTF-8", "en_US.UTF-8", "UTF-8"):
    with suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, name)
        break
settings.register_profile("no deadline", deadline=None)     # any example may take long on a busy machine
settings.load_profile("no deadline")
pytest.register_assert_rewrite("helpers.training")

TRIALS = Counter()


@pytest.fixture
def trial_counts() -> Counter:
    """Number of trials of each kind, for the summary at the end."""
    return TRIALS


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the trials of a pytest-xdist worker to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["trials"] = dict(TRIALS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Add the trials of a worker that has finished. (A worker that crashed sends none.)"""
    TRIALS.update(getattr(node, "workeroutput", {}).get("trials", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TRIALS:
        terminalreporter.section("reliability: trials")
        for what, count in TRIALS.items():
            terminalreporter.write_line(f"{count:6,}  {what}")


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((DATA / "losses.json").read_text())


@pytest.fixture(scope="session")
def golden_models(tmp_path_factory) -> dict[str, Path]:
    """The three golden models as Hugging Face directories with a vocabulary of 200 tokens: w7 has id 7."""
    directories = {}
    for name in MODELS:
        directory = directories[name] = tmp_path_factory.mktemp("models") / name
        directory.mkdir()
        shutil.copyfile(DATA / f"{name}.safetensors", directory / "model.safetensors")
        shutil.copyfile(DATA / f"{name}.config.json", directory / "config.json")
        (directory / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    return directories


@pytest.fixture
def golden_features(golden, tmp_path):
    """The golden batch of six examples as a feature file."""
    fields = golden["batch"]
    lengths = np.sum(fields["attention_mask"], axis=1)
    columns = zip(fields["input_ids"], lengths, fields["token_type_ids"], fields["labels"])
    rows = [(str(number), np.array(ids[:length]), length - sum(segments), label)
            for number, (ids, length, segments, label) in enumerate(columns)]
    return write_features(tmp_path / "golden.pkl", rows)


@pytest.fixture
def batch(golden):
    fields = golden["batch"]
    return Batch(*(torch.tensor(fields[name]) for name in ("input_ids", "token_type_ids", "attention_mask", "labels")))


def single_logit(source: Path, target: Path, **settings: object) -> Path:
    """Copy a model and give it one logit, the difference of its two, like most cross-encoders on the hub."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][1:] - weights[name][:1]
    save_file(weights, target / "model.safetensors")
    return change_config(target, num_labels=1, id2label={"0": "LABEL_0"}, **settings)


def change_config(directory: Path, **changes: object) -> Path:
    """Change settings in a model's config.json. Returns the directory."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tiny_vocabulary() -> list[str]:
    tokens = [f"w{number}" for number in range(200)]
    tokens[:5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return tokens


def words(ids: list[int]) -> str:
    """Return a text that tokenizes to these ids of the tiny vocabulary."""
    return " ".join(f"w{number}" for number in ids)


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script of the root (`report.py`), or a program below it by its module (`experiments.findings`)."""
    return subprocess.run([sys.executable, *program(name), *map(str, arguments)], capture_output=True, text=True,
                          timeout=900, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})


def program(name: str) -> list[str]:
    """What follows `python` on the command line of `run_script`."""
    return [str(ROOT / name)] if name.endswith(".py") else ["-m", name]


def write_features(path: Path, rows: list[tuple], max_seq_length: int = 32, set_name: str = "train") -> Path:
    """Write a feature file from rows of (id, token ids, length of the query segment, label)."""
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
    return bert_vocabulary({token: number for number, token in enumerate(tiny_vocabulary())}, lower_case=True)


def random_rows(count: int, max_seq_length: int = 32, seed: int = 0) -> list[tuple]:
    """Return pairs of random words, with ids of the form query_id#passage_id and alternating labels."""
    random, rows = np.random.default_rng(seed), []
    for number in range(count):
        length = int(random.integers(5, max_seq_length + 1))
        tokens = random.integers(5, 200, length)
        query_length = int(random.integers(3, length - 1))
        tokens[0], tokens[query_length - 1], tokens[-1] = 2, 3, 3
        rows.append((f"q{number // 10}#D{number % 10}_{number}", tokens, query_length, number % 2))
    return rows


def loss_terms(student, teacher, batch, weights, share=FULL_BATCH, **settings) -> dict[str, torch.Tensor]:
    """Compute the loss of a batch and its parts, as the training loop does."""
    chosen = ObjectiveSettings(weights=weights, **settings)
    terms = {name: value * share[mean_over(name, chosen.padding)]
             for name, value in objective(student, teacher, batch, chosen).items()}
    return total_loss(terms, weights)


@pytest.fixture
def interrupted(monkeypatch):
    """Context in which Ctrl-C interrupts the training after a number of steps."""
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
def run_here(monkeypatch, capsys):
    """Run a script's main in this process and return its stderr. A UserError is raised as it is."""
    def run(script, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        before = torch.get_float32_matmul_precision()
        try:
            script.main()
        finally:
            torch.set_float32_matmul_precision(before)  # half precision on a GPU sets TF32 for the whole process
        return capsys.readouterr().err
    return run
