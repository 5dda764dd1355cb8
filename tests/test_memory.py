"""The memory of a training step of Simplified TinyBERT is linear in the sequence length, with and without dropout.

A separate process takes one step each at lengths 128, 256 and 512, and reads its peak memory from the system after
each. Before that, a step at length 64 allocates everything that does not depend on the length.
"""
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

LENGTHS = (128, 256, 512)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_peak_memory_of_a_training_step_is_linear_in_the_length(dropout):
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, __file__, str(dropout)], capture_output=True, text=True, check=True,
                          env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0",
                               "MALLOC_MMAP_THRESHOLD_": "65536"})     # return freed memory at once
    peaks = json.loads(done.stdout)
    print(f"peak memory of a step at lengths {LENGTHS}, dropout {dropout}: {[peak >> 20 for peak in peaks]} MiB")
    assert peaks[1] < 2.2 * peaks[0] and peaks[2] < 2.2 * peaks[1]


def new_model(layers: int, hidden_size: int, dropout: float):
    import torch
    from transformers import BertConfig

    from simplified_tinybert.model.bert import CrossEncoder
    torch.manual_seed(0)
    return CrossEncoder(BertConfig(vocab_size=100, hidden_size=hidden_size, num_hidden_layers=layers,
                                   num_attention_heads=12, intermediate_size=4 * hidden_size,
                                   hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout))


def step(student, teacher, length: int) -> int:
    """Return the memory in bytes that a forward and backward pass adds at its peak."""
    import torch

    from simplified_tinybert.model.batch import Batch
    from simplified_tinybert.training.objective import ObjectiveSettings, objective, stage_weights, total_loss
    mask = (torch.arange(length) < torch.full((8, 1), length - 7)).long()
    batch = Batch(torch.randint(100, (8, length)), torch.zeros(8, length, dtype=torch.long), mask, torch.arange(8) % 2)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    settings = ObjectiveSettings(weights=stage_weights("simplified")[0])
    total_loss(objective(student, teacher, batch, settings), settings.weights)["loss"].backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - pages * resource.getpagesize()


def main() -> None:
    import torch

    from simplified_tinybert.model.pretrained import fit_projections
    dropout = float(sys.argv[1])
    student, teacher = new_model(3, 96, dropout).train(), new_model(6, 192, dropout).eval().requires_grad_(False)
    fit_projections(student, 192, torch.Generator().manual_seed(0))
    print(json.dumps([step(student, teacher, length) for length in (64, *LENGTHS)][1:]))


if __name__ == "__main__":
    main()
