"""Check the settings of distill.sh, reranker.sh and collection.sh before they start.

    python -m simplified_tinybert.checks.shell NAME=VALUE ... [-- HOW SCRIPT.py arguments] ...

Each NAME=VALUE is checked by its rule in RULES. Each SCRIPT.py parses the arguments that it will get later. HOW names
the function of the script that makes further checks: check_numbers or check_settings; "parse" means no such function.
With COLLECTION (collection.sh), its files are read, the models of all steps must fit together, and the directory OUT
must not hold results of other inputs. All errors are printed together, with exit code 2.
"""
import copy
import io
import os
import re
import runpy
import shlex
import sys
from contextlib import redirect_stderr
from itertools import groupby
from pathlib import Path

import torch

from simplified_tinybert.checks.collection_directory import check_collection, find_files, keep_inputs
from simplified_tinybert.checks.compatibility import check_pair
from simplified_tinybert.common.files import Problems, check_input_file, run_main
from simplified_tinybert.common.records import file_identity
from simplified_tinybert.common.text import gives_flag
from simplified_tinybert.model.configuration import find_models
from simplified_tinybert.model.pretrained import load_cross_encoder, load_ranker
from simplified_tinybert.model.weights import model_checksum
from simplified_tinybert.ranking.aggregation import NAMES, find_aggregation
from simplified_tinybert.ranking.measures import check_grades, parse_measures
from simplified_tinybert.ranking.trec import parse_score, read_qrels, read_run
from simplified_tinybert.tokenization.tokenizer_files import load_vocabulary
from simplified_tinybert.training.objective import METHODS, ObjectiveSettings, stage_weights

ROOT = Path(__file__).resolve().parents[2]


# Name → whether a value is valid, and what is expected instead. NaN is in no range.
POSITIVE = (re.compile("[1-9][0-9]{0,17}").fullmatch, "an integer of 1 or more")
RULES = {
    "AGGREGATION": (find_aggregation, NAMES),
    "COMPLETE": (re.compile("(?i:0|1|no|yes|false|true)?").fullmatch,          # is_yes in python_env.sh relies on this
                 "1, yes or true; or 0, no, false or nothing"),
    "DEVICE": (re.compile("auto|cpu|cuda|(cuda:)?[0-9]+").fullmatch,
               "auto, cpu, cuda, cuda:1, or a CUDA index such as 0"),
    "MAX_SEQ_LENGTH": (lambda value: POSITIVE[0](value) and 8 <= int(value) < 2 ** 16, "an integer from 8 to 65535"),
    "LEARNING_RATE": (lambda value: parse_score(value) >= 0, "a number of 0 or more"),
    "NUM_TRAIN_EPOCHS": (lambda value: parse_score(value) > 0, "a number above 0"),
    **dict.fromkeys(("PROCESSES", "STUDENT_LAYERS", "DEPTH", "EVAL_STEP", "TRAIN_BATCH_SIZE", "TRAIN_LOSS_STEP",
                     "SAVE_MODEL_STEP"), POSITIVE)}
# Flags that collection.sh sets itself
RESERVED = {"--output", "--docs", "--queries", "--qrels", "--candidates", "--dataset", "--corpus", "--cache_file_dir",
            "--features_file", "--general_student_model", "--teacher_model", "--output_student_dir", "--distill_model",
            "--dev_features_file", "--dev_qrels_file", "--device"}
FLAGS = (lambda value: not any(gives_flag(word, RESERVED) for word in value.split()),
         f"flags other than those that collection.sh sets itself ({' '.join(sorted(RESERVED))})")
RULES |= dict.fromkeys(("PASSAGE_FLAGS", "SAMPLE_FLAGS", "TRAIN_FLAGS", "TEACHER_FLAGS", "GENERAL_FLAGS"), FLAGS)
NO_FLAG = (lambda value: not value.startswith("-"), "a name that does not begin with '-'; put ./ before it")
RECORDED = ("STUDENT_LAYERS", "MAX_SEQ_LENGTH", "DEPTH", "EVAL_STEP")          # also change what collection.sh makes
FILES = {"FEATURES_FILE": "features", "TRAIN_EXAMPLES": "examples", "TEST_PAIRS": "pairs", "QRELS_FILE": "judgements",
         "RUN_FILE": "run"}


def check_variables(variables: dict[str, str], problems: Problems) -> None:
    """Check values. Also read judgements and run, which are otherwise read last. Input errors go to `problems`."""
    for name, value in variables.items():
        valid, expected = RULES.get(name, NO_FLAG)
        if name in FILES:
            if value:
                check_input_file(Path(value), problems, f"{FILES[name]} ({name})")
        elif not valid(value):
            problems.add(f"{name}={value}: expected {expected}")
    names = variables.get("MEASURES", "").split()
    if "MEASURES" in variables and not names:
        problems.add("MEASURES: is empty; expected measures such as nDCG@10 AP")
    measures = parse_measures(names, 1, problems)
    qrels, run = (Path(variables.get(name, "")) for name in ("QRELS_FILE", "RUN_FILE"))
    if qrels.is_file():
        check_grades(measures, qrels, read_qrels(qrels, problems), {}, True, problems)
    if run.is_file():
        read_run(run, problems)


def check_command(how: str, name: str, arguments: list[str], length: int | None, problems: Problems) -> None:
    """Check the arguments of a script, and that its models can read `length` tokens.

    $WORLD_SIZE is the number of processes in which the script will run.
    """
    script = runpy.run_path(str(ROOT / name))
    messages, original = io.StringIO(), sys.argv
    sys.argv = [name, *arguments]
    try:
        with redirect_stderr(messages):
            args = script["parse_args"]()
    except SystemExit:                                  # argparse has printed usage and error
        problems.add(messages.getvalue().rstrip().rpartition("\n")[2].replace("error: ", "", 1))
        return
    finally:
        sys.argv = original
    if how != "parse":
        script["select_precision"](args, script["select_device"](args.device, args.no_cuda), problems)
        found = script[how](args, problems)
        for role, (directory, config) in found.items() if how == "check_settings" else ():
            positions = config.max_position_embeddings
            if length and length > positions:
                problems.add(f"MAX_SEQ_LENGTH={length}: the {role} ({directory}) has {positions} positions; set "
                             f"MAX_SEQ_LENGTH={positions} or less")


def check_chain(teacher_name: str, student_name: str, new_layers: int, methods: list[str],
                fine_tuned: bool) -> dict[str, str]:
    """Check that the steps of collection.sh fit together, before the first one starts. Raises UserError.

    Returns the checksums of the models.

    new_layers: number of layers of a general student to be made from the named model; 0 if it exists already.
    fine_tuned: the teacher exists already; otherwise it will be made from the named model.
    """
    problems = Problems()
    if len(set(methods)) < max(1, len(methods)):
        problems.add(f"METHODS={' '.join(methods)}: expected one or more different methods of {' '.join(METHODS)}")
    for method in methods:
        if method not in METHODS:
            problems.add(f"METHODS: unknown method {method}; expected some of {' '.join(METHODS)}")
    models = find_models({"teacher": teacher_name, "student": student_name}, problems)
    problems.raise_if_any()
    (teacher_dir, teacher), (student_dir, student) = models["teacher"], models["student"]
    if load_vocabulary(teacher_dir).checksum() != load_vocabulary(student_dir).checksum():
        problems.add(f"{student_name}: its vocabulary differs from that of {teacher_name}; choose models with the same "
                     f"vocabulary, because teacher and students read the same features")
    if new_layers:
        student = copy.copy(student)
        student.num_hidden_layers = new_layers
        check_pair(models["student"].config, student, problems)
    if teacher_dir != student_dir and any(ObjectiveSettings(weights=weights).uses("layers")
                                          for method in methods for weights in stage_weights(method)):
        check_pair(teacher, student, problems)
    problems.raise_if_any()
    load_ranker(teacher_dir, teacher, None if fine_tuned else torch.Generator())
    if student_dir != teacher_dir:                      # new students take no head from the named model
        (load_cross_encoder if new_layers else load_ranker)(student_dir, models["student"].config, torch.Generator())
    return {f"{role} model": model_checksum(model.directory) for role, model in models.items()}


def check_collection_run(variables: dict[str, str]) -> None:
    """Check files and models of collection.sh, and that OUT holds no results of other inputs. Raises UserError."""
    problems, out = Problems(), Path(variables["OUT"])
    files = find_files(Path(variables["COLLECTION"]), problems)
    check_collection(files, out, problems)
    problems.raise_if_any()
    bert, teacher, student = (variables[f"{role}_MODEL"] for role in ("BERT", "TEACHER", "STUDENT"))
    models = check_chain(teacher or bert, student or bert, 0 if student else int(variables["STUDENT_LAYERS"]),
                         variables["METHODS"].split(), bool(teacher))
    inputs = {name: variables[name] for name in variables if name.endswith(("_MODEL", "_FLAGS")) or name in RECORDED}
    inputs |= models | {name: file_identity(path) for name, path in files.items()}
    out.mkdir(parents=True, exist_ok=True)
    made = any(path.suffix in (".tsv", ".pkl", ".trec") or path.is_dir() and path.name != "cache"    # not a log
               for path in out.iterdir() if not path.name.startswith("."))
    keep_inputs(out / "inputs.json", inputs, made)


def main() -> None:
    settings, *commands = [list(group) for separates, group in groupby(sys.argv[1:], "--".__eq__) if not separates]
    variables, problems = dict(setting.split("=", 1) for setting in settings), Problems()
    check_variables(variables, problems)
    # Existing feature files have their own length.
    length = variables.get("MAX_SEQ_LENGTH", "") if "FEATURES_FILE" not in variables else ""
    length = int(length) if RULES["MAX_SEQ_LENGTH"][0](length) else None
    if RULES["PROCESSES"][0](variables.get("PROCESSES", "")):
        os.environ["WORLD_SIZE"] = variables["PROCESSES"]
    for how, *words in commands:
        if not words or not words[0].endswith(".py"):
            problems.add(f"found the argument -- before {shlex.join([how, *words])}; leave it out")
            continue
        with problems.collect():
            check_command(how, words[0], words[1:], length, problems)
    problems.raise_if_any()
    if "COLLECTION" in variables:
        check_collection_run(variables)


if __name__ == "__main__":
    run_main(main)
