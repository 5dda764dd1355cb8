"""Is a difference between two runs more than chance? Paired tests over queries, Holm's correction over several runs.

Differences are first run less second run, one for each query on which both have a value. All tests are two-sided.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TESTS = ("t-test", "randomization")
EXACT_QUERIES = 16          # differing queries up to which all 2^n assignments of signs are gone through
PERMUTATIONS = 100_000
LEVEL = 0.05                # below which a corrected p is marked as significant
ROUNDING = 1e-12            # relative: values, or sums of differences, closer than this differ by rounding only
CHUNK = 2 ** 21             # signs that are drawn at a time, 8 bytes each


@dataclass
class Comparison:
    """Two runs on the queries on which both have a value; `holm` is filled in by `correct`, None: not defined."""
    queries: int
    means: tuple[float, float]
    difference: float
    wins: int
    ties: int
    losses: int
    p: dict[str, float | None]                          # test → p
    holm: dict[str, float | None]


def compare(first: dict[str, float], second: dict[str, float], permutations: int = PERMUTATIONS,
            seed: int = 42) -> Comparison:
    """Compare values by query. The queries are those that both hold; there has to be one.

    Equal values need not be equal to the last bit: AP's sums 1/2 + 2/3 and 1 + 2/12 are not. That is a tie.
    """
    queries = sorted(first.keys() & second.keys())      # so that lines in another order draw no other signs
    values = np.array([[first[query_id], second[query_id]] for query_id in queries], dtype=np.float64)
    differences = values[:, 0] - values[:, 1]
    differences[np.abs(differences) <= ROUNDING * np.abs(values).max(axis=1)] = 0.0
    tests = {"t-test": paired_t_test(differences), "randomization": randomization_test(differences, permutations, seed)}
    means = values.mean(axis=0)
    return Comparison(len(queries), (float(means[0]), float(means[1])), float(differences.mean()),
                      *wins_ties_losses(differences), tests, {})


def apply_holm(family: Sequence[Comparison]) -> None:
    """Fill in `holm` of comparisons that are read together: one measure, one run against several others."""
    for test in TESTS:
        for comparison, adjusted in zip(family, holm([each.p[test] for each in family])):
            comparison.holm[test] = adjusted


def wins_ties_losses(differences: np.ndarray) -> tuple[int, int, int]:
    """On how many queries the first run is better, equal, worse."""
    return int((differences > 0).sum()), int((differences == 0).sum()), int((differences < 0).sum())


def paired_t_test(differences: np.ndarray) -> float | None:
    """p of Student's paired t-test, by SciPy; None for a single query, which has no variance.

    SciPy's is not a number if all differences are zero; they speak for no difference at all: 1. Equal differences
    other than zero make t infinite, p 0.
    """
    if not differences.any():
        return 1.0
    if len(differences) < 2:
        return None
    if np.ptp(differences) <= ROUNDING * np.abs(differences).max():
        return 0.0
    from scipy import stats  # here, because it takes most of a second
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def randomization_test(differences: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 42) -> float:
    """p of Fisher's paired randomization test: if it were chance which run has which value, how often would the means
    differ by as much as they do?

    Exact over all assignments of signs for up to EXACT_QUERIES differing queries. For more, from `permutations` random
    ones, the one found among them: (1 + as extreme) / (1 + permutations), never 0. Queries without difference have no
    say. scipy.stats.permutation_test does the same, but takes some fifty times as long for thousands of queries.
    """
    differing = differences[differences != 0]
    if not len(differing):
        return 1.0
    least = abs(differing.sum()) - ROUNDING * np.abs(differing).sum()
    if len(differing) <= EXACT_QUERIES:
        flipped = np.arange(2 ** len(differing))[:, None] >> np.arange(len(differing)) & 1
        return float(_as_extreme(flipped, differing, least) / len(flipped))
    generator, extreme, done = np.random.default_rng(seed), 0, 0
    while done < permutations:
        rows = min(permutations - done, max(1, CHUNK // len(differing)))
        drawn = generator.integers(0, 256, size=(rows, -(-len(differing) // 8)), dtype=np.uint8)
        extreme += _as_extreme(np.unpackbits(drawn, axis=1, count=len(differing)), differing, least)
        done += rows
    return (1 + extreme) / (1 + permutations)


def _as_extreme(flipped: np.ndarray, differences: np.ndarray, least: float) -> int:
    """Rows of `flipped` (1: sign changed) after which the sum of the differences is at least `least` from zero."""
    sums = differences.sum() - 2 * (flipped.astype(np.float64) @ differences)
    return int((np.abs(sums) >= least).sum())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down p-values (Scandinavian Journal of Statistics 6, 1979), in the order given; None stays None.

    The smallest of m is multiplied by m, the next by m - 1, ...; none becomes smaller than one before it, or exceeds 1.
    """
    order = sorted((index for index, p in enumerate(p_values) if p is not None), key=lambda index: p_values[index])
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
