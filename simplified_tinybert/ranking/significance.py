"""Paired significance tests over queries, with Holm's correction for several comparisons.

A difference is the first run's value minus the second's, on each query where both have a value. All tests are
two-sided.
"""
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

TESTS = ("t-test", "randomization")
EXACT_QUERIES = 16          # up to here the randomization test enumerates all 2^n sign assignments
PERMUTATIONS = 100_000
LEVEL = 0.05
ROUNDING = 1e-12            # relative; values and sums closer than this differ only by rounding
CHUNK = 2 ** 21             # signs drawn at a time, 8 bytes each

Label = TypeVar("Label", bound=Hashable)


@dataclass
class Comparison:
    """Two runs on the queries where both have a value. A p of None: the test is not defined."""
    queries: int
    means: tuple[float, float]
    difference: float
    wins: int
    ties: int
    losses: int
    p: dict[str, float | None]                          # test → p
    holm: dict[str, float | None]                       # test → p after Holm's correction, set by `compare_pairs`

    def significant(self, test: str) -> bool:
        return self.holm[test] is not None and self.holm[test] < LEVEL


def compare_pairs(pairs: dict[Label, tuple[dict[str, float], dict[str, float]]], permutations: int = PERMUTATIONS,
                  seed: int = 42) -> dict[Label, Comparison]:
    """Compare pairs of runs as one family, with Holm's correction. Pairs without common queries are left out."""
    family = {label: compare(first, second, permutations, seed) for label, (first, second) in pairs.items()
              if first.keys() & second.keys()}
    for test in TESTS:
        corrected = holm([comparison.p[test] for comparison in family.values()])
        for comparison, p in zip(family.values(), corrected):
            comparison.holm[test] = p
    return family


def compare(first: dict[str, float], second: dict[str, float], permutations: int = PERMUTATIONS,
            seed: int = 42) -> Comparison:
    """Compare values by query on the queries that both hold; there must be at least one.

    Values that differ only by rounding are ties: AP's sums 1/2 + 2/3 and 1 + 2/12 differ in the last bit.
    """
    queries = sorted(first.keys() & second.keys())      # the random signs must not depend on the order of the lines
    values = np.array([[first[query_id], second[query_id]] for query_id in queries], dtype=np.float64)
    differences = values[:, 0] - values[:, 1]
    differences[np.abs(differences) <= ROUNDING * np.abs(values).max(axis=1)] = 0.0
    tests = {"t-test": paired_t_test(differences), "randomization": randomization_test(differences, permutations, seed)}
    means = values.mean(axis=0)
    return Comparison(len(queries), (float(means[0]), float(means[1])), float(differences.mean()),
                      *(int((np.sign(differences) == sign).sum()) for sign in (1, 0, -1)), tests, {})


def paired_t_test(differences: np.ndarray) -> float | None:
    """Return the p of Student's paired t-test; None for a single query, which has no variance.

    If all differences are zero, p is 1 (SciPy returns NaN). If all are equal but not zero, t is infinite and p is 0.
    """
    if not differences.any():
        return 1.0
    if len(differences) < 2:
        return None
    if np.ptp(differences) <= ROUNDING * np.abs(differences).max():
        return 0.0
    from scipy import stats  # takes most of a second
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def randomization_test(differences: np.ndarray, permutations: int = PERMUTATIONS, seed: int = 42) -> float:
    """Return the p of Fisher's paired randomization test.

    It is the probability of a mean difference at least this large if the signs of the differences were random. Up to
    EXACT_QUERIES non-zero differences it is exact. For more, it is estimated from `permutations` random assignments and
    the observed one: (1 + as extreme) / (1 + permutations), never 0. scipy.stats.permutation_test does the same, but
    takes fifty times as long for thousands of queries.
    """
    nonzero = differences[differences != 0]
    if not len(nonzero):
        return 1.0
    threshold = abs(nonzero.sum()) - ROUNDING * np.abs(nonzero).sum()
    if len(nonzero) <= EXACT_QUERIES:
        flipped = np.arange(2 ** len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1
        return float(_count_extreme(flipped, nonzero, threshold) / len(flipped))
    generator, extreme, done = np.random.default_rng(seed), 0, 0
    while done < permutations:
        rows = min(permutations - done, max(1, CHUNK // len(nonzero)))
        drawn = generator.integers(0, 256, size=(rows, -(-len(nonzero) // 8)), dtype=np.uint8)
        extreme += _count_extreme(np.unpackbits(drawn, axis=1, count=len(nonzero)), nonzero, threshold)
        done += rows
    return (1 + extreme) / (1 + permutations)


def _count_extreme(flipped: np.ndarray, differences: np.ndarray, threshold: float) -> int:
    """Count the rows of `flipped` (1: sign changed) that bring the absolute sum to `threshold` or more."""
    sums = differences.sum() - 2 * (flipped.astype(np.float64) @ differences)
    return int((np.abs(sums) >= threshold).sum())


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down p-values (Scandinavian Journal of Statistics 6, 1979) in input order; None stays None.

    The smallest of m is multiplied by m, the next by m - 1, and so on. Then values above 1 become 1, and no value is
    less than that of a smaller p.
    """
    order = sorted((index for index, p in enumerate(p_values) if p is not None), key=lambda index: p_values[index])
    adjusted, largest = [None] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
