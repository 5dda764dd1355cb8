"""What a new user types: shell scripts from any folder, with data of their own; and what the README promises."""
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

SCRIPTS = ("distill.sh", "reranker.sh", "collection.sh", "test.sh")
COMMANDS = ("prepare_examples.py", "tokenize_to_features.py", "general_distill.py", "distill.py", "reranker.py",
            "convert_to_trec_results.py", "msmarco_mrr_eval.py", "report.py", "convert_tf_checkpoint.py")
PAGES = ["README.md", "benchmarks/README.md", "examples/README.md",
         *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def bash(script, *arguments, cwd, **environment):
    return subprocess.run(["bash", str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env=os.environ | {"PYTHON": sys.executable} | environment)


@pytest.mark.parametrize("name", [*SCRIPTS, "ditill.sh", "python_env.sh", ".ci/run"])
def test_shell_scripts_are_clean(name):
    content = (ROOT / name).read_bytes()
    assert b"\r" not in content                                   # the original's had them: "command not found"
    assert subprocess.run(["bash", "-n", ROOT / name]).returncode == 0
    if name in SCRIPTS:
        assert content.startswith(b"#!/usr/bin/env bash\n") and b"\nset -euo pipefail\n" in content
        assert os.access(ROOT / name, os.X_OK)


@pytest.fixture
def own_data(golden_models, tmp_path):
    """A user's folder with models, training examples, test pairs and judgements; everything named relatively."""
    for name, folder in golden_models.items():
        shutil.copytree(folder, tmp_path / "my models" / name)
    rows = [(row[0], words(row[1][1:row[2] - 1]), words(row[1][row[2]:-1]), row[3]) for row in random_rows(40)]
    (tmp_path / "train.tsv").write_text("".join(f"{n}\t{q}\t{p}\t{y}\n" for n, (_, q, p, y) in enumerate(rows)))
    (tmp_path / "pairs.tsv").write_text("".join(f"{i}\t{q}\t{p}\n" for i, q, p, _ in rows))
    (tmp_path / "qrels.txt").write_text("".join(f"q{number} 0 D1 1\n" for number in range(4)))
    return tmp_path


def test_distill_and_rerank_with_data_of_ones_own_from_any_folder(own_data):
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


def test_several_processes_by_a_variable(own_data):
    models = {"TEACHER_MODEL": "my models/teacher", "STUDENT_MODEL": "my models/student_2x24", "DEVICE": "cpu"}
    done = bash("distill.sh", cwd=own_data, TRAIN_EXAMPLES="train.tsv", MAX_SEQ_LENGTH="32", PROCESSES="2",
                OUTPUT_STUDENT_DIR="out put", **models)
    assert done.returncode == 0 and "processes    2, each computes its part of 64" in done.stderr, done.stderr
    for processes in "21":
        done = bash("reranker.sh", cwd=own_data, MODEL_DIR="out put", TEST_PAIRS="pairs.tsv", OUTPUT_DIR=processes,
                    MAX_SEQ_LENGTH="32", DEVICE="cpu", PROCESSES=processes)
        assert done.returncode == 0, done.stderr
    assert (own_data / "2" / "scores.tsv").read_bytes() == (own_data / "1" / "scores.tsv").read_bytes()


def test_reranking_before_distilling_says_what_to_do(tmp_path):
    done = bash("reranker.sh", cwd=tmp_path, EXAMPLE_DIR=str(tmp_path / "none"))
    assert done.returncode == 2 and "bash distill.sh" in done.stderr


@pytest.mark.parametrize("script, environment, message", [
    ("reranker.sh", {"AGGREGATION": "MinP"}, "AGGREGATION=MinP: expected MaxP"),
    ("reranker.sh", {"QRELS_FILE": "none.txt"}, "QRELS_FILE=none.txt: no such file"),
    ("reranker.sh", {"FEATURES_FILE": "test.pkl"}, "set MODEL_DIR"),
    ("distill.sh", {"FEATURES_FILE": "train.pkl"}, "set STUDENT_MODEL"),
    ("distill.sh", {"FEATURES_FILE": "train.pkl", "STUDENT_MODEL": "s"}, "set TEACHER_MODEL"),
    ("distill.sh", {"PROCESSES": "all"}, "PROCESSES=all: expected a number"),
    ("reranker.sh", {"PROCESSES": "0"}, "PROCESSES=0: expected a number"),
    ("distill.sh", {"PYTHON": "no-such-python"}, "PYTHON=no-such-python is not an interpreter"),
])
def test_mistakes_in_variables_are_told_at_once(tmp_path, script, environment, message):
    done = bash(script, cwd=tmp_path, **environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.parametrize("script", ["distill.sh", "ditill.sh", "reranker.sh"])
def test_shell_scripts_explain_their_variables(tmp_path, script):
    done = bash(script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    used = set(re.findall(r"\$\{([A-Z][A-Z_]+):-", (ROOT / script.replace("ditill", "distill")).read_text()))
    assert used and all(name in done.stdout for name in used)


def test_features_shorter_than_256_need_no_flag(own_data):
    """What a user with features of 32 word pieces and models of 64 positions meets."""
    models = {"TEACHER_MODEL": "my models/teacher", "STUDENT_MODEL": "my models/student_2x24", "DEVICE": "cpu"}
    done = bash("distill.sh", cwd=own_data, TRAIN_EXAMPLES="train.tsv", FEATURES_FILE="train.pkl", MAX_SEQ_LENGTH="32",
                OUTPUT_STUDENT_DIR="one", **models)
    assert done.returncode == 0, done.stderr
    done = bash("distill.sh", cwd=own_data, FEATURES_FILE="train.pkl", OUTPUT_STUDENT_DIR="two", **models)
    assert done.returncode == 0, done.stderr
    done = bash("distill.sh", cwd=own_data, FEATURES_FILE="train.pkl", OUTPUT_STUDENT_DIR="three", MAX_SEQ_LENGTH="256",
                **models)
    assert done.returncode == 2 and "64 positions, 256 are asked for; leave --max_seq_length out" in done.stderr


def test_a_failing_step_ends_the_script(own_data):
    (own_data / "train.tsv").write_text("1\tonly two columns\n")
    done = bash("distill.sh", cwd=own_data, TEACHER_MODEL="my models/teacher", STUDENT_MODEL="my models/student_2x24",
                TRAIN_EXAMPLES="train.tsv", OUTPUT_STUDENT_DIR="out")
    assert done.returncode == 2 and "train.tsv:1: found 2 tab-separated columns" in done.stderr
    assert not (own_data / "out").exists()


def test_an_environment_is_taken_only_if_it_has_what_is_pinned(tmp_path):
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
    """(script, its arguments as typed) of every command in a document; with `for` loops, for each value."""
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
def test_every_command_line_is_understood(page, help_texts, monkeypatch, capsys):
    for script, arguments in command_lines(page):
        if "/" in script:                               # of benchmarks/ and experiments/, which have tests of their own
            assert (ROOT / script).is_file(), script
            continue
        unknown = set(re.findall(r"--[a-z]\w+", arguments)) - set(re.findall(r"--[a-z]\w+", help_texts[script]))
        assert not unknown, f"{script}{arguments}"
        if "…" in arguments or "..." in arguments:
            continue
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(arguments, comments=True)])
        try:
            importlib.import_module(script.removesuffix(".py")).parse_args()
        except SystemExit:
            pytest.fail(f"{script}{arguments}: {capsys.readouterr().err.splitlines()[-1]}")


@pytest.mark.parametrize("block", [block for page in ("docs/msmarco.md", "docs/replication.md") for block in re.findall(
    r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)])
def test_blocks_to_paste_are_shell(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    for target in targets:
        assert (ROOT / page).parent.joinpath(target).exists(), target
