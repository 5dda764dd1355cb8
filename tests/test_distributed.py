"""Several processes, started by torchrun: the same student and scores as one process, resuming, errors."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, loss_terms, random_rows, write_features
from helpers.reranking import arguments as rerank_arguments
from helpers.training import arguments, assert_same_student, dev_set, torchrun, with_dropout, without_speed
from hypothesis import given, settings
from hypothesis import strategies as st

import distill
import reranker
from simplified_tinybert.common import files
from simplified_tinybert.common.device import select_device
from simplified_tinybert.common.files import UserError
from simplified_tinybert.common.processes import FULL_BATCH, Processes, process_group
from simplified_tinybert.data import features
from simplified_tinybert.data.features import Examples
from simplified_tinybert.model.pretrained import load_cross_encoder
from simplified_tinybert.training import settings as training_settings
from simplified_tinybert.training.objective import METHODS, stage_weights

OBJECTIVES = {"reference": ["--padding", "reference"], "masked": ["--padding", "masked"],
              "standard": ["--distill_model", "standard", "--temperature", 2],
              "finetune": ["--distill_model", "finetune"],
              "tinybert": ["--distill_model", "tinybert", "--loss_weights", "hard=2"],
              "attention": ["--loss_weights", "hidden=0", "soft=0", "hard=0"]}


def run_cases(processes, directory, *cases):
    cases = [{key: list(map(str, values)) if key == "argv" else values for key, values in case.items()}
             for case in cases]
    (directory / "cases.json").write_text(json.dumps(cases, default=str))
    done = torchrun(processes, "tests/torchrun_cases.py", directory / "cases.json")
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stderr[-4000:]}"


def assert_same_bytes(directory, other):
    for name in ("model.safetensors", "fit_dense.safetensors"):
        assert (directory / name).read_bytes() == (other / name).read_bytes()
    assert without_speed(directory / "train_loss.jsonl") == without_speed(other / "train_loss.jsonl")
    assert (directory / "dev.jsonl").read_bytes() == (other / "dev.jsonl").read_bytes()


@pytest.mark.parametrize("processes, examples, batch, accumulation", [
    pytest.param(2, 27, 8, 2, marks=pytest.mark.slow), pytest.param(3, 25, 8, 1, marks=pytest.mark.slow)])
def test_several_processes_give_the_same_student_as_one(golden_models, tmp_path, run_here, processes, examples, batch,
                                                        accumulation):
    """With uneven shares and a last batch of 3 examples for two processes, or 1 for three; then resume with dropout."""
    file = write_features(tmp_path / "train.pkl", random_rows(examples))
    common = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation, "--learning_rate", 1e-3,
              "--warmup_proportion", 0.2, "--train_loss_step", 1)
    runs = {name: arguments(file, golden_models, tmp_path / name, *more, *common) for name, more in OBJECTIVES.items()}
    cases = [{"argv": argv} for argv in runs.values()]
    random = golden_models | {"student_2x24": with_dropout(golden_models["student_2x24"], tmp_path / "dropout")}
    more = ("--num_train_epochs", 4, "--save_model_step", 3, *common[:-1], 2, *dev_set(tmp_path), "--eval_step", 2)
    cases.append({"argv": arguments(file, random, tmp_path / "whole", *more)})
    cases.append({"argv": arguments(file, random, tmp_path / "halves", *more, "--resume"),
                  "rewind": [tmp_path / "whole", tmp_path / "halves", 3]})
    cases.append({"argv": arguments(file, golden_models, tmp_path / "broken", *common, "--learning_rate", 1e30,
                                    "--num_train_epochs", 9)})
    run_cases(processes, tmp_path, *cases)

    for name, argv in runs.items():
        one = tmp_path / f"{name}-of-one"
        run_here(distill, *[one if part == tmp_path / name else part for part in argv])
        assert_same_student(one, tmp_path / name)
    assert_same_bytes(tmp_path / "whole", tmp_path / "halves")
    states = torch.load(tmp_path / "whole" / "checkpoint-3" / "training_state.pt", weights_only=True)["processes"]
    assert len({state["random"].numpy().tobytes() for state in states}) == processes
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for rank in range(processes):
        assert "--learning_rate" in (tmp_path / f"broken.error-{rank}").read_text()
    resume_in_one_process(tmp_path, runs["masked"], run_here)


def resume_in_one_process(tmp_path, argv, run_here):
    """Resume a run of several processes with one. Without dropout, the student and the log are the same."""
    output = tmp_path / "masked"
    finished = shutil.copytree(output, tmp_path / "masked-finished")
    for path in output.glob("checkpoint-*"):
        if path.name != "checkpoint-0":
            shutil.rmtree(path)
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(record | {"finished": False}))
    assert "another device or number of processes" in run_here(distill, *argv, "--resume")
    assert_same_student(finished, output)


def test_distill_with_torchrun(golden_models, tmp_path, run_here):
    file = write_features(tmp_path / "train.pkl", random_rows(20))
    run_here(distill, *arguments(file, golden_models, tmp_path / "one", "--train_batch_size", 8))
    done = torchrun(2, "distill.py", *arguments(file, golden_models, tmp_path / "two", "--train_batch_size", 8))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("layer map") == done.stderr.count(f"student      {tmp_path / 'two'}") == 1
    assert re.search("processes +2, .* 8 examples", done.stderr)
    assert_same_student(tmp_path / "one", tmp_path / "two")
    contents = [sorted(path.name.split(".tfevents")[0] for path in (tmp_path / name).rglob("*"))
                for name in ("one", "two")]
    assert contents[0] == contents[1]


def test_several_processes_give_the_same_bytes_of_scores_as_one(golden_models, tmp_path, run_here, monkeypatch):
    """Nine chunks: two processes exchange logits after every other chunk; three resume after the second."""
    monkeypatch.setattr(features, "CHUNK_EXAMPLES", 40)
    files_of_pairs = [write_features(tmp_path / f"{part}.pkl", random_rows(count, seed=part), set_name="test")
                      for part, count in enumerate((200, 130))]
    call = rerank_arguments(golden_models["teacher"], files_of_pairs, tmp_path / "scores.tsv", "--batch_tokens", 200)
    run_here(reranker, *call)
    whole = (tmp_path / "scores.tsv").read_bytes()
    (tmp_path / "scores.tsv").unlink()
    done = torchrun(2, "reranker.py", *call)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scores.tsv").read_bytes() == whole
    assert done.stderr.count("330 pairs, ") == 1
    for end in ("", ".run.json"):
        (tmp_path / f"scores.tsv{end}").rename(tmp_path / f"scores.tsv.partial{end}")
    os.truncate(tmp_path / "scores.tsv.partial", sum(map(len, whole.splitlines(keepends=True)[:90])) + 5)
    done = torchrun(3, "reranker.py", *call, "--resume")
    assert done.returncode == 0, done.stderr
    assert "80/330" in done.stderr and (tmp_path / "scores.tsv").read_bytes() == whole
    assert json.loads((tmp_path / "scores.tsv.run.json").read_text())["processes"] == 3
    assert not (tmp_path / "scores.tsv.partial").exists()


@pytest.mark.slow
def test_errors_are_printed_once_and_end_all_processes(golden_models, tmp_path):
    file = write_features(tmp_path / "train.pkl", random_rows(20))
    done = torchrun(2, "distill.py", *arguments(file, golden_models, tmp_path / "out", "--train_batch_size", 1,
                                                "--temperature", -1))
    assert done.returncode not in (0, 124)
    for problem in ("--train_batch_size 1: ", "--temperature -1.0: "):
        assert done.stderr.count(f"error: {problem}") == 1
    assert 'distill.py", line' not in done.stderr and "exitcode  : 2" in done.stderr
    assert not (tmp_path / "out").exists()


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(5, 20), min_size=1, max_size=9), count=st.integers(1, 5),
       kind=st.sampled_from(list(OBJECTIVES)), seed=st.integers(0, 99))
def test_shares_of_a_batch_add_up_to_it(golden_models, lengths, count, kind, seed):
    """Terms and gradients in double precision, for any number of processes."""
    random = np.random.default_rng(seed)
    examples = Examples(random.integers(5, 200, sum(lengths)).astype(np.uint16), np.array(lengths, np.uint16),
                        random.integers(3, np.array(lengths) - 1).astype(np.uint16),
                        random.integers(0, 2, len(lengths)).astype(np.int8))
    student, _ = load_cross_encoder(golden_models["student_2x24"], dtype=torch.float64)
    teacher, _ = load_cross_encoder(golden_models["teacher"], dtype=torch.float64)
    weights = stage_weights(kind if kind in METHODS else "simplified", alpha=0.3)[0]
    padding = "masked" if kind == "masked" else "reference"
    pad_to = 20 if padding == "reference" else None
    indices = random.permutation(len(lengths))

    def terms_and_gradients(parts):
        student.zero_grad()
        total = {}
        for own, share in parts:
            terms = loss_terms(student, teacher, examples.batch(own, pad_to), weights, share, temperature=1.5,
                               padding=padding)
            terms["loss"].backward()
            total = {name: total.get(name, 0.0) + value.item() for name, value in terms.items()}
        return total, {name: weight.grad.clone() for name, weight in student.named_parameters()
                       if weight.grad is not None}
    whole, gradients = terms_and_gradients([(indices, FULL_BATCH)])
    parts = [Processes(rank, rank, count).share(indices, examples) for rank in range(count)]
    shared, sums = terms_and_gradients(parts)
    assert shared == pytest.approx(whole, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sums[name], gradient, rtol=1e-9, atol=1e-12)
    counted = [own for own, share in parts if share["examples"]]
    assert sorted(np.concatenate(counted).tolist()) == list(range(len(lengths)))
    assert max(map(len, counted)) - min(map(len, counted)) <= 1


def test_one_process_has_the_whole_batch_exactly():
    lengths = np.random.default_rng(0).integers(5, 512, 1000).astype(np.uint16)
    examples = Examples(np.empty(0, np.uint16), lengths, lengths, np.zeros(1000, np.int8))
    own, share = Processes().share(np.arange(3, 700, 7), examples)
    assert share == FULL_BATCH and np.array_equal(own, np.arange(3, 700, 7))


def test_merging_preserves_every_bit():
    values = np.array([[-0.0, 0.0], [np.nan, -np.inf], [1e-45, 3.4e38]], np.float32)
    values.view(np.int32)[1, 0] |= 12345                                        # a NaN with a payload
    assert Processes().merge(values).tobytes() == values.tobytes()


def test_an_error_of_nccl_is_one_line_with_its_cause(monkeypatch):
    """NCCL names the cause in the last line. The group is that of one process, whose exchange fails."""
    for name, value in zip(("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "20001", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "new_group", lambda **kwargs: None)
    with pytest.raises(UserError, match=r"this process's GPU failed.*NCCL error in: x\.cpp.*'out of memory'"), \
            process_group(torch.device("cpu")):
        raise dist.DistBackendError("NCCL error in: x.cpp:77, unhandled cuda error\nLast:\nfailure 'out of memory'")


def set_environment(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("rank, local_rank", [(0, 0), (8, 0), (1, 1), (10, 2)])
def test_which_process_prints_an_error(monkeypatch, capsys, rank, local_rank):
    """The first process of a machine prints at once, the others after a delay that depends on their local rank."""
    set_environment(monkeypatch, RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=16)
    waited, printed_before = [], []

    def sleep(seconds):
        waited.append(seconds)
        printed_before.append(capsys.readouterr().err)

    def main():
        files.say("note")
        raise UserError("two\nproblems")
    monkeypatch.setattr(files.time, "sleep", sleep)
    with pytest.raises(SystemExit) as ended:
        files.run_main(main, distributed=True)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "note\nerror: two\nerror: problems\n"
    assert sum(waited) == files.SECONDS_PER_RANK * local_rank and not any(printed_before)


def test_without_an_error_only_the_first_process_prints(monkeypatch, capsys):
    for rank in (0, 1, 2):
        set_environment(monkeypatch, RANK=rank, LOCAL_RANK=rank % 2, WORLD_SIZE=3)
        files.run_main(lambda: files.say("note"), distributed=True)
    assert capsys.readouterr().err == "note\n"


def test_devices_of_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(select_device("auto")) == str(select_device("0")) == "cuda:0"
    set_environment(monkeypatch, RANK=3, LOCAL_RANK=1, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2)
    assert str(select_device("auto")) == str(select_device("cuda")) == "cuda:1"
    assert str(select_device("auto", no_cuda=True)) == str(select_device("cpu")) == "cpu"
    for name in ("0", "cuda:1"):
        with pytest.raises(UserError, match=f"--device {name}: 4 processes"):
            select_device(name)
    set_environment(monkeypatch, RANK=0, LOCAL_RANK=0, WORLD_SIZE=4, LOCAL_WORLD_SIZE=4)
    with pytest.raises(UserError, match="2 CUDA devices .* 4 processes"):
        select_device("auto")


def test_an_incomplete_torchrun_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, .*: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"), \
            process_group(torch.device("cpu")):
        pass


@pytest.mark.parametrize(("rank", "port"), [(2, "29500"), (0, "abc")])
def test_a_wrong_torchrun_environment_is_refused(monkeypatch, rank, port):
    set_environment(monkeypatch, WORLD_SIZE=2, RANK=rank, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with pytest.raises(UserError, match=f"RANK is {rank}, WORLD_SIZE 2, MASTER_PORT {port}; expected"), \
            process_group(torch.device("cpu")):
        pass


def test_a_process_that_waits_for_others_can_be_stopped():
    """While it waits, Python handles no signals."""
    code = """
import torch
from simplified_tinybert.common.files import run_main
from simplified_tinybert.common.processes import process_group
def main():
    print("started", flush=True)
    with process_group(torch.device("cpu")):
        pass
run_main(main)
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                                "MASTER_PORT": str(port)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"started\n"
        time.sleep(1)
        process.terminate()
        assert process.wait(timeout=30) in (-signal.SIGTERM, 143)


def test_apex_is_refused_with_several_processes(golden_models, tmp_path, run_here, monkeypatch):
    file = write_features(tmp_path / "train.pkl", random_rows(8))
    monkeypatch.setattr(training_settings, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--fp16_backend apex: .* one process"):
        run_here(distill, *arguments(file, golden_models, tmp_path / "out", "--fp16", "--fp16_backend", "apex"))
