"""The main figures of one or more studies, from their results.json. Not a command: used by findings.py --summary.

    {"collections": {NAME: {"queries", "bm25", "teacher", "teacher_seeds": {seed: value},
                            "teacher_minus_bm25": DIFFERENCE, "students": [STUDENT]}}}
    STUDENT     {"method", "shape", "mean", "sd", "retention", "speed_up",
                 "minus_teacher": DIFFERENCE, "minus_bm25": DIFFERENCE}
    DIFFERENCE  {"difference", "low", "high", "p", "p_holm"}

The measure is nDCG@10. sd: standard deviation over the seeds, null for one seed. retention: share of the teacher's
value. A difference is between each query's means over the seeds: 95 % confidence interval, p of a paired two-sided
t-test before and after Holm's correction.
"""
import json
import statistics
from pathlib import Path

from simplified_tinybert.common.files import UserError, atomic_writer, say

MEASURE = "nDCG@10"


def write_summary(studies: list[dict], path: Path) -> None:
    """Raises UserError if two studies have the same collection, or one was not evaluated on the test queries."""
    collections = {}
    for results in studies:
        name = results["collection"]
        if name in collections:
            raise UserError(f"found two results for collection {name}; give only one of them")
        if "systems" not in results:
            raise UserError(f"the results for {name} do not include the test queries (--until dev); leave them out")
        if MEASURE not in results["settings"]["measures"]:
            raise UserError(f"the results for {name} have no {MEASURE}; add it to measures in the settings, and run "
                            f"the study's command again")
        collections[name] = summarise_study(results)
    with atomic_writer(path) as handle:
        json.dump({"collections": collections}, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
    say(f"summary      {path}")


def summarise_study(results: dict) -> dict:
    means = {system["name"]: statistics.fmean(system["seeds"][MEASURE]) for system in results["systems"]}
    minus_bm25, minus_teacher = (results["comparisons"][name][MEASURE] for name in ("BM25", "teacher"))
    students = [{
        "method": system["method"], "shape": system["shape"], "mean": rounded(means[system["name"]]),
        "sd": rounded(statistics.stdev(values)) if len(values := system["seeds"][MEASURE]) > 1 else None,
        "retention": rounded(means[system["name"]] / means["teacher"]) if means["teacher"] else None,
        "speed_up": rounded(system["speed_up"]), "minus_teacher": difference(minus_teacher[system["name"]]),
        "minus_bm25": difference(minus_bm25[system["name"]])}
        for system in results["systems"] if system["name"] in minus_teacher]
    return {"queries": results["queries"], "bm25": rounded(means["BM25"]), "teacher": rounded(means["teacher"]),
            "teacher_seeds": {seed: rounded(averages[MEASURE][0])
                              for seed, averages in results.get("teacher_seeds", {}).items()},
            "teacher_minus_bm25": difference(minus_bm25["teacher"]), "students": students}


def difference(comparison: dict) -> dict:
    low, high = comparison["interval"]
    return {"difference": rounded(comparison["difference"]), "low": rounded(low), "high": rounded(high),
            "p": rounded(comparison["p"]["t-test"]), "p_holm": rounded(comparison["holm"]["t-test"])}


def rounded(value: float | None) -> float | None:
    """Round to six significant digits."""
    return None if value is None else float(f"{value:.6g}")
