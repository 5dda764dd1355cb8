"""Code for GPUs on a pretended CUDA device (benchmarks/pretended_cuda.py): as it is, and with seeded faults.

What is asserted stands in pretended_cuda_cases.py, which runs in a process of its own.
"""
import json
import os
import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
from conftest import ROOT

DTYPES = ("float32", "bf16", "fp16")
METHODS = ("finetune", "standard", "tinybert, layers", "tinybert, logits", "simplified", "rankings")
CASES = [*(f"step: {method}, {dtype}, {padding}"
           for method, dtype, padding in product(METHODS, DTYPES, ("reference", "masked"))),
         *(f"{kind}: {dtype}" for kind, dtype in product(("checkpoint", "validation", "scoring"), DTYPES)),
         "scoring: bf16, heads of 12"]
FAULTS = {
    "a constant on the CPU in a loss": "same device",
    "the log reads the loss in each step": "_local_scalar_dense",
    "a branch that depends on data": "_local_scalar_dense",
    "a mask on the CPU": "converts the attention mask",
    "a shape that depends on data": "DynamicOutputShape",
    "optimizer's state on the CPU": "optimizer's state is on",
    "a norm compared on the host": "_local_scalar_dense",
    "a kernel for each tensor in the optimizer": "kernels in a step",
    "Gram products in half precision": "types of Gram products",
    "the teacher is cast in each step": "kernels in a step",
    "a boolean mask": "converts the attention mask",
    "the batch stays on the CPU": "same device",
    "an expanded tensor is pinned": "cannot be pinned",
    "GradScaler asks twice": "asked the device 2 times",
    "scores are read batch by batch": "waits for the device",
    "scores are read without waiting": "0 waits for a chunk",
    "heads without a fast kernel": "have no fast kernel",
    "scores are read twice in validation": "4 waits for two chunks",
    "a checkpoint without the GPU's random state": "states of a process",
    "a checkpoint with the log's tensor of the device": "sums of the log"}

pytestmark = [
    pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None,
                       reason="needs a CPU build of PyTorch: others have a real device guard")]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, str | None]]:
    """Return kind → name → error or None."""
    done = subprocess.run([sys.executable, str(ROOT / "tests/pretended_cuda_cases.py")], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str | None]] = {"case": {}, "fault": {}}
    for kind, name, error in map(json.loads, done.stdout.splitlines()):
        found[kind][name] = error
    assert found["case"].keys() == set(CASES) and found["fault"].keys() == FAULTS.keys()
    return found


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_wrong_on_a_gpu(outcomes, name):
    assert outcomes["case"][name] is None


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_found(outcomes, name):
    assert FAULTS[name] in (outcomes["fault"][name] or "nothing was found")
