"""The figures of one study or several in short, from their results.json. Not a command: findings.py --summary.

{"collections": {NAME: {"queries", "bm25", "teacher", "teacher_seeds": {seed: value}, "teacher_minus_bm25": DIFFERENCE,
"students": [{"method", "shape", "mean", "sd", "retention", "speed_up", "minus_teacher": DIFFERENCE, "minus_bm25":
DIFFERENCE}]}}}; DIFFERENCE: {"difference", "low", "high", "p", "p_holm"}, of the means over the seeds by query: 95 %
interval, paired two-sided t-test, before and after Holm's correction. Measure: nDCG@10. retention: share of the
teacher's value; sd: over the seeds, null for one seed.
"""
import json
import statistics
from pathlib import Path

from simplified_tinybert.common.files import UserError, atomic_writer, say

MEASURE, TEST, DIGITS = "nDCG@10", "t-test", 6


def write_summary(studies: list[dict], path: Path) -> None:
    """Raises UserError for two studies of collections of one name, or for one without test queries."""
    collections = {}
    for results in studies:
        name = results["collection"]
        if name in collections:
            raise UserError(f"two of the results are of a collection called {name}; name one of them")
        if "systems" not in results:
            raise UserError(f"the results of {name} are without the test queries (--until dev); leave them out")
        collections[name] = of_study(results)
    with atomic_writer(path) as handle:
        json.dump({"collections": collections}, handle, indent=1, ensure_ascii=False)
        handle.write("\n")
    say(f"summary      {path}")


def of_study(results: dict) -> dict:
    means = {system["name"]: statistics.fmean(system["seeds"][MEASURE]) for system in results["systems"]}
    minus_bm25, minus_teacher = (results["comparisons"][name][MEASURE] for name in ("BM25", "teacher"))
    students = [{
        "method": system["method"], "shape": system["shape"], "mean": short(means[system["name"]]),
        "sd": short(statistics.stdev(values)) if len(values := system["seeds"][MEASURE]) > 1 else None,
        "retention": short(means[system["name"]] / means["teacher"]) if means["teacher"] else None,
        "speed_up": short(system["speed_up"]), "minus_teacher": difference(minus_teacher[system["name"]]),
        "minus_bm25": difference(minus_bm25[system["name"]])}
        for system in results["systems"] if system["name"] in minus_teacher]
    return {"queries": results["queries"], "bm25": short(means["BM25"]), "teacher": short(means["teacher"]),
            "teacher_seeds": {seed: short(found[MEASURE][0])
                              for seed, found in results.get("teacher_seeds", {}).items()},
            "teacher_minus_bm25": difference(minus_bm25["teacher"]), "students": students}


def difference(comparison: dict) -> dict:
    low, high = comparison["interval"]
    return {"difference": short(comparison["difference"]), "low": short(low), "high": short(high),
            "p": short(comparison["p"][TEST]), "p_holm": short(comparison["holm"][TEST])}


def short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")
