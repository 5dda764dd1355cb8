"""Per-query measures of a ranking: reciprocal ranks are computed here, all others by ir_measures."""
import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from simplified_tinybert.common.files import Problems, UserError, say
from simplified_tinybert.ranking import trec
from simplified_tinybert.ranking.trec import Qrels, Run

MRR_CUTOFFS = {"MRR": None, "MRR@10": 10, "MRR@100": 100}
GDEVAL_LARGEST_GRADE = 4

PerQuery = dict[str, float]  # query id → value
Rankings = dict[str, list[str]]  # query id → document ids, best first


class Result(NamedTuple):
    values: PerQuery
    average: float


@dataclass
class Evaluation:
    """The measures of a run, and the queries they are averaged over."""
    queries: list[str]
    missing: list[str]          # judged, but not in the run
    not_judged: list[str]
    float32_ties: int           # pairs of different scores that are equal in single precision
    results: dict[str, Result]  # by measure


def evaluate(qrels: Qrels, run: Run, measures: list[Any], level: int, complete: bool) -> Evaluation:
    """Compute MRR, its cutoffs and `measures` (from `parse_measures`) over the judged queries of the run.

    With `complete`, averages are over all judged queries; a query that the run lacks counts as 0.
    """
    missing = [query_id for query_id in qrels if query_id not in run]
    not_judged = [query_id for query_id in run if query_id not in qrels]
    rankings = {query_id: trec.rank(scores) for query_id, scores in run.items() if query_id in qrels}
    ties = sum(trec.float32_ties(run[query_id].values()) for query_id in rankings)
    if complete:
        rankings |= {query_id: [] for query_id in missing}
    results = dict(reciprocal_ranks(qrels, rankings, level)) | dict(other_measures(measures, qrels, rankings))
    return Evaluation(list(rankings), missing, not_judged, ties, results)


def say_gaps(evaluation: Evaluation, source: str) -> None:
    """Print where a measure is undefined, and warn of float32 ties; `source` precedes each message."""
    for name, result in evaluation.results.items():
        if len(result.values) < len(evaluation.queries):
            say(f"{source}{name} is defined for only {len(result.values)} queries; the average is over these")
    trec.warn_of_float32_ties(evaluation.float32_ties, source)


def reciprocal_rank(ranking: Sequence[str], relevant: Collection[str], cutoff: int | None = None) -> float:
    """Return 1 / rank of the first relevant document among the first `cutoff`, or 0."""
    return next((1 / position for position, document_id in enumerate(ranking[:cutoff], start=1)
                 if document_id in relevant), 0.0)


def reciprocal_ranks(qrels: Qrels, rankings: Rankings, level: int) -> Iterator[tuple[str, Result]]:
    """Yield name and result for MRR and its cutoffs; grades of `level` or more are relevant."""
    relevant = {query_id: {document_id for document_id, grade in qrels[query_id].items() if grade >= level}
                for query_id in rankings}
    for name, cutoff in MRR_CUTOFFS.items():
        values = {query_id: reciprocal_rank(ranking, relevant[query_id], cutoff)
                  for query_id, ranking in rankings.items()}
        yield name, Result(values, trec.sum_in_order(values.values()) / len(values))


def parse_measures(names: list[str], level: int, problems: Problems) -> list[Any]:
    """Return the ir_measures objects of these names, with `level` as relevance level unless a name sets its own."""
    measures = {}
    for name in names:
        try:
            measure = _parse_measure(name, level)
            measures[str(measure)] = measure
        except ValueError as error:
            problems.add(f"--measures {name}: {error}")
    return list(measures.values())


def choose_measures(names: list[str], level: int, problems: Problems) -> tuple[list[str], list[object]]:
    """Return the names of the measures, spelled as in results, and the measures that ir_measures computes."""
    chosen, others = [], []
    for name in names:
        parsed = [] if name in MRR_CUTOFFS else parse_measures([name], level, problems)
        chosen += [name] if name in MRR_CUTOFFS else map(str, parsed)
        others += parsed
    return list(dict.fromkeys(chosen)), others


def _parse_measure(name: str, level: int) -> Any:
    """Raises ValueError with the reason if ir_measures cannot compute the measure."""
    try:
        import ir_measures  # takes half a second, and MRR does not need it
    except ImportError:
        raise UserError("--measures needs the package ir_measures: pip install ir_measures") from None
    measure = None
    try:
        measure = ir_measures.parse_measure(name)
        parameters = measure.SUPPORTED_PARAMS
        usage = ", ".join(f"{parameter}{' (required)' if info.required else ''}"
                          for parameter, info in parameters.items())
        # Binary measures have rel=1 by default. Measures such as RBP use graded relevance unless a rel is given.
        if level != 1 and "rel" in parameters and parameters["rel"].default == 1 and "rel" not in measure.params:
            measure = measure(rel=level)
        measure.validate_params()
        positive = measure.params.get("cutoff", 1) >= 1 and measure.params.get("rel", 1) >= 1
        if positive:                                    # pytrec_eval would end the process at P@0
            ir_measures.evaluator([measure], {})        # fails unless the package that computes it is installed
    except NameError:
        known = ir_measures.measures.registry
        word = name.partition("@")[0].partition("(")[0]
        spellings = {each.lower(): each for each in reversed(known)}  # the first of nDCG and its alias NDCG
        close = [spellings[each] for each in difflib.get_close_matches(word.lower(), spellings)]
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"unknown measure; {hint}ir_measures offers {', '.join(sorted(known))}") from None
    except AssertionError:
        raise ValueError(f"a parameter is missing or wrong; {measure.NAME} takes {usage}; examples: nDCG@10, "
                         f"AP(rel=2)@100") from None
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if measure is not None and "following providers" not in reason:     # which names packages to install
            reason += f"; ir_measures cannot compute {measure.NAME} with these parameters; it takes {usage}"
        raise ValueError(reason) from error
    if not positive:
        raise ValueError("cutoff and rel must be 1 or more")
    return measure


def check_grades(measures: list[Any], path: Path, qrels: Qrels, runs: dict[Path, Run], complete: bool,
                 problems: Problems) -> None:
    """Check that every measure can handle the grades of the averaged queries. `path` is the file of the qrels."""
    grades = ((grade, query_id, document_id) for query_id, judgements in qrels.items()
              if complete or any(query_id in run for run in runs.values())
              for document_id, grade in judgements.items())
    grade, query_id, document_id = max(grades, default=(0, "", ""))
    for measure in measures:
        if grade > GDEVAL_LARGEST_GRADE and _provider(measure) == "gdeval":
            line = trec.line_of_judgement(path, query_id, document_id)
            problems.add(f"{path}{f':{line}' if line else ''}: found grade {grade}; --measures {measure} is computed "
                         f"by gdeval, which takes grades up to {GDEVAL_LARGEST_GRADE}; leave the measure out, or map "
                         f"the grades to 0 to {GDEVAL_LARGEST_GRADE}")


def _provider(measure: Any) -> str | None:
    """Return the name of the first installed provider of ir_measures that computes this measure."""
    import ir_measures
    return next((provider.NAME for provider in ir_measures.DefaultPipeline.providers
                 if provider.supports(measure) and provider.is_available()), None)


def other_measures(measures: list[Any], qrels: Qrels, rankings: Rankings) -> Iterator[tuple[str, Result]]:
    """Yield name and result for measures of ir_measures, all computed on these rankings.

    A measure may be undefined for a query; the query then has no value.
    """
    if not measures:
        return
    import ir_measures
    # Each provider of ir_measures sorts documents by its own tie rule. Scores that count down from the number of
    # documents leave no ties; they are integers, which single precision represents exactly.
    # Queries are numbered because gdeval accepts only numeric ids: it reads "trec-12" as 12.
    numbers = {query_id: str(number) for number, query_id in enumerate(rankings, start=1)}
    run = {numbers[query_id]: {document_id: float(len(ranking) - position)
                               for position, document_id in enumerate(ranking)}
           for query_id, ranking in rankings.items() if ranking}
    # trec_eval crashes if all grades of a query are below -1. To every measure, such a grade is the same as -1.
    judged = {number: {document_id: max(grade, -1) for document_id, grade in qrels[query_id].items()}
              for query_id, number in numbers.items()}
    for measure in measures:  # one call each: in a joint call, ir_measures adds zeros where a measure is undefined
        try:
            calculated = {metric.query_id: metric.value for metric in ir_measures.iter_calc([measure], judged, run)}
        except Exception as error:  # providers run other programs and raise any exception
            raise UserError(f"--measures {measure}: ir_measures could not compute it: {error}") from error
        values = {query_id: calculated[number] for query_id, number in numbers.items() if number in calculated}
        aggregator = measure.aggregator()  # the sum for counts such as NumRel, the mean for most others
        for value in values.values():
            aggregator.add(value)
        yield str(measure), Result(values, aggregator.result())
