"""Run distill.py several times in processes that torchrun starts once: torchrun ... torchrun_cases.py cases.json

A case holds `argv`, and optionally `rewind`: [finished run, new directory, step]. It first makes the new directory look
as if the run had been stopped after that step. A process writes its error message to OUTPUT.error-RANK.
"""
import json
import shutil
import sys
from pathlib import Path

import torch

import distill
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.processes import process_group
from simplified_tinybert.training.checkpoints import newest_checkpoint, step_of


def rewind(source: Path, target: Path, step: int) -> None:
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    run = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(run | {"finished": False}))
    while step_of(newest_checkpoint(target)) > step:
        shutil.rmtree(newest_checkpoint(target))


def main() -> None:
    with process_group(torch.device("cpu")) as processes:
        for case in json.loads(Path(sys.argv[1]).read_text()):
            if "rewind" in case and processes.first:
                rewind(*map(Path, case["rewind"][:2]), case["rewind"][2])
            processes.barrier()
            sys.argv[1:] = case["argv"]
            args = distill.parse_args()
            try:
                distill.distill(args, processes)
            except UserError as error:
                Path(f"{args.output_student_dir}.error-{processes.rank}").write_text(str(error))
            processes.barrier()


if __name__ == "__main__":
    main()
