"""Are the settings of a shell script right? Asked by distill.sh, reranker.sh and collection.sh before all else.

    python -m simplified_tinybert.common.shell NAME=VALUE ... [-- HOW SCRIPT.py arguments] ...

Each NAME=VALUE is checked by the rule of that name below. Each script parses the arguments that it will be given later;
with check_numbers or check_settings for HOW (or "parse": neither) that function of the script checks them further. All
that is wrong is told at once, with exit code 2.
"""
import argparse
import io
import math
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

from simplified_tinybert.common.files import Problems, UserError, check_input_file, run_main
from simplified_tinybert.ranking.aggregation import aggregation
from simplified_tinybert.ranking.measures import check_grades, parse_measures
from simplified_tinybert.ranking.trec import read_qrels, read_run

ROOT = Path(__file__).resolve().parents[2]
Rule = Callable[[str], str | None]                      # a value → what is expected instead, or None


def whole(least: int, most: float = math.inf) -> Rule:
    def check(value: str) -> str | None:
        right = re.fullmatch("0|[1-9][0-9]{0,17}", value) and least <= int(value) <= most
        return None if right else f"a whole number from {least}" + (f" to {most}" if most < math.inf else "")
    return check


def number(least: float, least_allowed: bool) -> Rule:
    def check(value: str) -> str | None:
        try:
            found = float(value) if "_" not in value else math.nan
        except ValueError:
            found = math.nan
        right = least < found < math.inf or least_allowed and found == least
        return None if right else f"a number {'from' if least_allowed else 'above'} {least:g}"
    return check


def yes_or_no(value: str) -> str | None:
    """The shell function is_yes relies on it that nothing else is left."""
    right = value.lower() in ("", "0", "1", "no", "yes", "false", "true")
    return None if right else "1, yes or true; or 0, no, false or nothing"


def device(value: str) -> str | None:
    right = re.fullmatch("auto|cpu|cuda|(cuda:)?[0-9]+", value)
    return None if right else "auto, cpu, cuda, cuda:1, or a CUDA index such as 0"


def an_aggregation(value: str) -> str | None:
    try:
        aggregation(value)
    except argparse.ArgumentTypeError as error:
        return str(error).partition("none of ")[2]
    return None


def not_a_flag(value: str) -> str | None:
    """For names of files and models, which become values of flags."""
    return f"a name that does not begin with '-', such as ./{value}" if value.startswith("-") else None


RULES = {
    "AGGREGATION": an_aggregation, "COMPLETE": yes_or_no, "DEVICE": device, "PROCESSES": whole(1),
    "MAX_SEQ_LENGTH": whole(8, 2 ** 16 - 1), "STUDENT_LAYERS": whole(1), "DEPTH": whole(1), "EVAL_STEP": whole(1),
    "TRAIN_BATCH_SIZE": whole(1), "TRAIN_LOSS_STEP": whole(1), "SAVE_MODEL_STEP": whole(1),
    "LEARNING_RATE": number(0, True), "NUM_TRAIN_EPOCHS": number(0, False)}
FILES = {"FEATURES_FILE": "features", "TRAIN_EXAMPLES": "examples", "TEST_PAIRS": "pairs", "QRELS_FILE": "judgements",
         "RUN_FILE": "run"}


def check_variables(variables: dict[str, str], problems: Problems) -> None:
    """Complain about values; read what is to be evaluated at the very end."""
    for name, value in variables.items():
        if name in FILES:
            if value:
                check_input_file(Path(value), problems, f"{FILES[name]} ({name})")
        elif expected := RULES.get(name, not_a_flag)(value):
            problems.add(f"{name}={value}: expected {expected}")
    measures = []
    if "MEASURES" in variables:
        names = variables["MEASURES"].split()
        if not names:
            problems.add("MEASURES: names no measure; expected some such as nDCG@10 AP")
        measures = parse_measures(names, 1, problems)
    qrels, run = (Path(variables.get(name, "")) for name in ("QRELS_FILE", "RUN_FILE"))
    if qrels.is_file():
        check_grades(measures, qrels, read_qrels(qrels, problems), {}, True, problems)
    if run.is_file():
        read_run(run, problems)


def check_command(how: str, name: str, arguments: list[str], length: int | None, problems: Problems) -> None:
    """Complain about arguments that a script refuses, and about models that cannot read `length` tokens."""
    script = runpy.run_path(str(ROOT / name))
    told, before = io.StringIO(), sys.argv
    sys.argv = [name, *arguments]
    try:
        with redirect_stderr(told):
            args = script["parse_args"]()
    except SystemExit:                                  # of argparse, after its message
        problems.add(told.getvalue().rstrip().rpartition("\n")[2].replace("error: ", "", 1))
        return
    finally:
        sys.argv = before
    if how != "parse":
        script["select_precision"](args.fp16, args.bf16, script["select_device"](args.device, args.no_cuda), problems)
        for role, (directory, config) in (script[how](args, problems) or {}).items():
            if length and length > config.max_position_embeddings:
                problems.add(f"MAX_SEQ_LENGTH={length}: the {role} ({directory}) has {config.max_position_embeddings} "
                             f"positions; set MAX_SEQ_LENGTH={config.max_position_embeddings} or less")


def main() -> None:
    groups = [[]]
    for argument in sys.argv[1:]:
        if argument == "--":
            groups.append([])
        else:
            groups[-1].append(argument)
    variables, problems = dict(argument.split("=", 1) for argument in groups[0]), Problems()
    check_variables(variables, problems)
    length = variables.get("MAX_SEQ_LENGTH", "") if "FEATURES_FILE" not in variables else ""    # those have a length
    length = int(length) if length and not RULES["MAX_SEQ_LENGTH"](length) else None
    for how, name, *arguments in groups[1:]:
        try:
            check_command(how, name, arguments, length, problems)
        except UserError as error:
            problems.add(str(error))
    problems.raise_if_any()


if __name__ == "__main__":
    run_main(main)
