"""Command lines and inputs of distill.py, torchrun, and comparisons of students and logs."""
import json
import os
import shutil
import subprocess
import sys

from conftest import ROOT, change_config, random_rows, write_features
from safetensors.torch import load_file

SHAPE = {"model_type": "bert", "vocab_size": 200, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 96, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}


def arguments(features, models, output, *more, student="student_2x24", teacher="teacher"):
    return ["--features_file", features, "--teacher_model", models[teacher], "--general_student_model", models[student],
            "--output_student_dir", output, "--cache_file_dir", output.parent / "cache", "--device", "cpu", *more]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log_of(output):
    return rows_of(output / "train_loss.jsonl")


def without_speed(path):
    return [{name: value for name, value in row.items() if name != "examples_per_second"} for row in rows_of(path)]


def dev_set(directory):
    """Write 40 dev pairs of 4 queries, of which one is not judged, and return the flags for them."""
    rows = random_rows(40, seed=1)
    write_features(directory / "dev.pkl", rows, set_name="dev")
    (directory / "qrels.txt").write_text("".join(f"q{query} 0 D{document} {document % 3}\n"
                                                 for query in (0, 1, 2, 9) for document in range(10)))
    return ("--dev_features_file", directory / "dev.pkl", "--dev_qrels_file", directory / "qrels.txt")


def with_dropout(directory, target):
    """Copy a model and give it dropout of 0.1."""
    return change_config(shutil.copytree(directory, target), hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


def torchrun(processes, script, *more):
    """Run a script in several processes: 20 s on two cores, minutes on a busy machine. Exit code 124: it hung."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               str(ROOT / script), *map(str, more)]
    return subprocess.run(["timeout", "1200", *command], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})


def student_of(directory):
    return load_file(directory / "model.safetensors") | load_file(directory / "fit_dense.safetensors")


def assert_same_student(directory, other):
    """Two students and their logs are equal up to 1e-5 of each tensor's norm and each logged value."""
    one, two = student_of(directory), student_of(other)
    assert one.keys() == two.keys()
    found = {name: ((one[name] - two[name]).norm() / one[name].norm()).item() for name in one if one[name].any()}
    key_biases = {name: found.pop(name) for name in list(found) if name.endswith("key.bias")}
    # A key bias shifts all scores of a query by the same amount, so softmax ignores it. Without an attention loss, its
    # exact gradient is 0, but Adam turns the rounding errors into full steps.
    if json.loads((directory / "run.json").read_text())["settings"]["loss_weights"][-1].get("attention"):
        found |= key_biases
    rows = list(zip(log_of(directory), log_of(other), strict=True))
    names = [name for name in rows[0][0] if name != "examples_per_second"]
    losses = max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-9) for a, b in rows for name in names)
    print(f"{other.name}: tensors {max(found.values()):.1e}, key biases {max(key_biases.values()):.1e}, "
          f"log {losses:.1e}")
    assert max(found.values()) < 1e-5 and losses < 1e-5
