"""Measures of a ranking, for each query: reciprocal ranks computed here, all others by ir_measures."""
import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simplified_tinybert.common.files import Problems, UserError
from simplified_tinybert.ranking.trec import float32_ties, line_of_judgement, rank, sum_in_order

LARGEST_GRADE = {"gdeval": 4}      # of what ir_measures computes by other programs, where it is below trec_eval's
MRR_CUTOFFS = {"MRR": None, "MRR@10": 10, "MRR@100": 100}  # documents of a ranking that are looked at; None: all

PerQuery = dict[str, float]  # query id → value
Rankings = dict[str, list[str]]  # query id → document ids, best first
Qrels = dict[str, dict[str, int]]  # query id → document id → grade
Run = dict[str, dict[str, float]]  # query id → document id → score


@dataclass
class Evaluation:
    """A run's measures, and the queries they were averaged over."""
    queries: list[str]
    missing: list[str]          # judged, but not in the run
    not_judged: list[str]
    float32_ties: int           # pairs of scores that trec_eval, in single precision, would take for equal
    results: list[tuple[str, PerQuery, float]]          # (measure, value of each query, average)


def evaluate(qrels: Qrels, run: Run, measures: list[Any], level: int, complete: bool) -> Evaluation:
    """MRR and its cutoffs, then `measures` (of `parse_measures`), over the judged queries of the run.

    With `complete` over all judged queries, those that are missing from the run as 0.
    """
    missing = [query_id for query_id in qrels if query_id not in run]
    not_judged = [query_id for query_id in run if query_id not in qrels]
    rankings = {query_id: rank(scores) for query_id, scores in run.items() if query_id in qrels}
    ties = sum(float32_ties(run[query_id].values()) for query_id in rankings)
    if complete:
        rankings |= {query_id: [] for query_id in missing}
    results = [*reciprocal_ranks(qrels, rankings, level), *other_measures(measures, qrels, rankings)]
    return Evaluation(list(rankings), missing, not_judged, ties, results)


def check_common_queries(qrels_path: Path, qrels: Qrels, runs: dict[Path, Run], problems: Problems) -> None:
    """Complain about judgements without lines, and about runs none of whose queries is judged."""
    for path, content in ((qrels_path, qrels), *runs.items()):
        if not content:
            problems.add(f"{path}: is empty; there is nothing to evaluate")
    for path, run in runs.items():
        if qrels and run and not qrels.keys() & run.keys():
            problems.add(f"{path}: none of its queries ({first_ten(run)}) is judged in {qrels_path} "
                         f"({first_ten(qrels)}); do the two belong together?")


def first_ten(ids: Collection[str]) -> str:
    shown = ", ".join(list(ids)[:10])
    return f"{shown}, ..." if len(ids) > 10 else shown


def reciprocal_rank(ranking: Sequence[str], relevant: Collection[str], cutoff: int | None = None) -> float:
    """1 / rank of the first relevant document among the first `cutoff`, 0 if there is none."""
    for position, document_id in enumerate(ranking[:cutoff], start=1):
        if document_id in relevant:
            return 1 / position
    return 0.0


def reciprocal_ranks(qrels: Qrels, rankings: Rankings, level: int) -> Iterator[tuple[str, PerQuery, float]]:
    """(name, value of each query, mean) for MRR and its cutoffs; relevant is what has a grade of at least `level`."""
    relevant = {query_id: {document_id for document_id, grade in qrels[query_id].items() if grade >= level}
                for query_id in rankings}
    for name, cutoff in MRR_CUTOFFS.items():
        values = {query_id: reciprocal_rank(ranking, relevant[query_id], cutoff)
                  for query_id, ranking in rankings.items()}
        yield name, values, sum_in_order(values.values()) / len(values)


def parse_measures(names: list[str], level: int, problems: Problems) -> list[Any]:
    """ir_measures' measures of these names, each relevance level that was left open set to `level`."""
    try:
        import ir_measures  # here, because it takes half a second that MRR alone need not cost
    except ImportError:
        raise UserError("--measures needs the package ir_measures: pip install ir_measures") from None
    known = ir_measures.measures.registry
    measures = {}
    for name in names:
        measure = None
        try:
            measure = ir_measures.parse_measure(name)
            options = measure.SUPPORTED_PARAMS
            takes = ", ".join(f"{option}{' (required)' if info.required else ''}" for option, info in options.items())
            # A default of 1 means binary: for measures such as RBP, no level at all means graded relevance.
            if level != 1 and "rel" in options and options["rel"].default == 1 and "rel" not in measure.params:
                measure = measure(rel=level)
            measure.validate_params()
            if measure.params.get("cutoff", 1) < 1 or measure.params.get("rel", 1) < 1:
                # pytrec_eval ends the whole process at P@0
                problems.add(f"--measures {name}: cutoff and rel have to be 1 or more")
            else:
                ir_measures.evaluator([measure], {})  # finds out whether the package that computes it is installed
                measures[str(measure)] = measure
        except NameError:
            word = name.partition("@")[0].partition("(")[0]
            lower = {each.lower(): each for each in reversed(known)}  # of nDCG and its alias NDCG, the first
            near = [lower[each] for each in difflib.get_close_matches(word.lower(), lower)]
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            problems.add(f"--measures {name}: unknown measure; {hint}ir_measures offers {', '.join(sorted(known))}")
        except AssertionError:
            problems.add(f"--measures {name}: a parameter is missing or wrong; {measure.NAME} takes: {takes}; written "
                         f"like nDCG@10 or AP(rel=2)@100")
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            if measure is not None and "following providers" not in reason:     # packages to install
                reason += f"; with its parameters as they are here, nothing computes {measure.NAME}; it takes: {takes}"
            problems.add(f"--measures {name}: {reason}")
    return list(measures.values())


def check_grades(measures: list[Any], path: Path, qrels: Qrels, runs: dict[Path, Run], complete: bool,
                 problems: Problems) -> None:
    """Complain about measures that cannot be computed with a grade of the queries that are averaged over.

    `qrels` were read from `path`, to which the message leads.
    """
    grades = ((grade, query_id, document_id) for query_id, of_query in qrels.items()
              if complete or any(query_id in run for run in runs.values())
              for document_id, grade in of_query.items())
    largest, query_id, document_id = max(grades, default=(0, "", ""))
    for measure in measures:
        provider = _provider(measure)
        limit = LARGEST_GRADE.get(provider, largest)
        if largest > limit:
            line = line_of_judgement(path, query_id, document_id)
            problems.add(f"{path}{f':{line}' if line else ''}: found grade {largest}; --measures {measure} is computed "
                         f"by {provider}, which takes grades up to {limit}; leave the measure out, or map the grades "
                         f"to 0 to {limit}")


def _provider(measure: Any) -> str | None:
    """Name of the part of ir_measures that computes this measure: the first of those installed that can."""
    import ir_measures
    return next((provider.NAME for provider in ir_measures.DefaultPipeline.providers
                 if provider.supports(measure) and provider.is_available()), None)


def other_measures(measures: list[Any], qrels: Qrels, rankings: Rankings) -> Iterator[tuple[str, PerQuery, float]]:
    """(name, value of each query, average) for ir_measures' measures, all of them on our order of the documents.

    A measure may be undefined for a query, which then has no value.
    """
    if not measures:
        return
    import ir_measures
    # Each provider of ir_measures sorts anew and has a tie rule of its own. Scores that count down from the number of
    # documents leave it no ties to break; they are whole numbers, which single precision holds exactly.
    # Queries get numbers, for gdeval knows no other ids, and of "trec-12" it takes the 12.
    numbers = {query_id: str(number) for number, query_id in enumerate(rankings, start=1)}
    run = {numbers[query_id]: {document_id: float(len(ranking) - position)
                               for position, document_id in enumerate(ranking)}
           for query_id, ranking in rankings.items() if ranking}
    judged = {number: qrels[query_id] for query_id, number in numbers.items()}
    for measure in measures:  # one by one: in company, ir_measures fills in zeros where a measure is not defined
        try:
            calculated = {metric.query_id: metric.value for metric in ir_measures.iter_calc([measure], judged, run)}
        except Exception as error:  # providers run programs of their own and raise what these make them raise
            raise UserError(f"--measures {measure}: ir_measures could not compute it: {error}") from error
        values = {query_id: calculated[number] for query_id, number in numbers.items() if number in calculated}
        aggregator = measure.aggregator()  # a mean for nearly all, a sum for counts such as NumRel
        for value in values.values():
            aggregator.add(value)
        yield str(measure), values, aggregator.result()
