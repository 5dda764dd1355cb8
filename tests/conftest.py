"""Golden figures of the original implementation and tiny models, as every test file needs them."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"
MODELS = ("teacher", "student_2x24", "student_4x48")

os.environ["HF_HUB_OFFLINE"] = "1"                     # no test may reach out
os.environ["TOKENIZERS_PARALLELISM"] = "true"
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads((DATA / "losses.json").read_text())


@pytest.fixture(scope="session")
def golden_models(tmp_path_factory) -> dict[str, Path]:
    """The three golden models as Hugging Face folders with a vocabulary of 200 made-up pieces: w7 is id 7."""
    folders = {}
    for name in MODELS:
        folder = folders[name] = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        shutil.copyfile(DATA / f"{name}.safetensors", folder / "model.safetensors")
        shutil.copyfile(DATA / f"{name}.config.json", folder / "config.json")
        (folder / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    return folders


def tiny_vocabulary() -> list[str]:
    pieces = [f"w{number}" for number in range(200)]
    for number, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]):
        pieces[number] = piece
    return pieces


def words(ids: list[int]) -> str:
    """A text that tokenizes to these ids of the tiny vocabulary."""
    return " ".join(f"w{number}" for number in ids)


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, check=False)
