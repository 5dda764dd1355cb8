"""Paired tests and Holm's correction: by hand, against SciPy, and properties for any values."""
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from simplified_tinybert.ranking import significance

value = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1 / 3, 0.7, 1.0])
pairs = st.integers(1, 9).flatmap(lambda count: st.tuples(*[st.lists(value, min_size=count, max_size=count)] * 2))
p_values = st.lists(st.floats(0, 1), max_size=8)


def by_query(numbers):
    return {f"q{number}": value for number, value in enumerate(numbers)}


# ---- by hand

def test_wins_ties_losses():
    found = significance.compare(by_query([0.5, 0.0, -0.1, 0.2, 0.0, 1e-9]), by_query([0.0] * 6))
    assert (found.wins, found.ties, found.losses) == (3, 2, 1)


def test_t_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/√3, t = 2√3; with 2 degrees of freedom p = 1 − t/√(2 + t²)."""
    t = 2 * np.sqrt(3)
    assert significance.paired_t_test(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - t / np.sqrt(2 + t * t), rel=1e-12)
    assert significance.paired_t_test(np.array([1.0, -1.0])) == 1.0


def test_randomization_by_hand():
    """Of the 8 assignments of signs to 1, 2, 3 only + + + and - - - reach a sum of 6; four of 1, 2, -3 reach 0: all."""
    assert significance.randomization_test(np.array([1.0, 2.0, 3.0])) == 2 / 8
    assert significance.randomization_test(np.array([1.0, 2.0, -3.0])) == 1.0
    assert significance.randomization_test(np.array([2.0, 2.0, -1.0])) == 4 / 8      # ±5 and ±3, but not ±1 (twice)
    assert significance.randomization_test(np.array([1.0, 0.0, 2.0, 0.0, 3.0])) == 2 / 8
    assert significance.randomization_test(np.array([0.3])) == 1.0


def test_sums_that_differ_by_rounding_only_are_as_extreme():
    assert 0.1 + 0.2 - 0.3 != 0
    assert significance.randomization_test(np.array([0.1, 0.2, -0.3])) == 1.0


def test_holm_by_hand():
    """0.01·4, 0.03·3, max(0.03·3, 0.04·2), max(…, 0.2·1)."""
    assert significance.holm([0.04, 0.01, 0.2, 0.03]) == pytest.approx([0.09, 0.04, 0.2, 0.09])
    assert significance.holm([0.01, None, 0.04]) == pytest.approx([0.02, None, 0.04])
    assert significance.holm([0.6, 0.7]) == [1.0, 1.0]
    assert significance.holm([0.03]) == [0.03] and significance.holm([]) == []


def test_a_comparison_by_hand():
    found = significance.compare({"a": 0.5, "b": 1.0, "only": 0.9, "c": 0.25}, {"c": 0.5, "a": 0.25, "b": 1.0, "x": 0})
    assert (found.queries, found.wins, found.ties, found.losses) == (3, 1, 1, 1)
    assert found.means == pytest.approx((1.75 / 3, 1.75 / 3)) and found.difference == 0
    assert found.p == {"t-test": 1.0, "randomization": 1.0} and found.holm == {}


def test_values_that_differ_by_rounding_only_are_ties():
    first, second = by_query([(1 / 2 + 2 / 3) / 2, 0.3, 1e-9]), by_query([(1 + 2 / 12) / 2, 0.1 + 0.2, 0.0])
    assert first["q0"] != second["q0"] and first["q1"] != second["q1"]
    found = significance.compare(first, second)
    assert (found.wins, found.ties, found.losses) == (1, 2, 0)
    del first["q2"], second["q2"]
    found = significance.compare(first, second)
    assert found.difference == 0 and found.p == {"t-test": 1.0, "randomization": 1.0}


def test_families_are_corrected_by_test():
    first, others = by_query([0.1, 0.2, 0.3, 0.4, 0.5]), [[0.2, 0.3, 0.4, 0.5, 0.7], [0.2, 0.1, 0.2, 0.6, 0.7]]
    pairs = {number: (first, by_query(other)) for number, other in enumerate(others)}
    family = significance.compare_pairs(pairs | {"nothing in common": (first, {"x": 1.0})})
    assert family.keys() == pairs.keys()
    for test in significance.TESTS:
        p_values = [comparison.p[test] for comparison in family.values()]
        assert [comparison.holm[test] for comparison in family.values()] == significance.holm(p_values)
    assert family[0].p["randomization"] == 2 / 32


# ---- edges

def test_a_run_compared_with_itself():
    found = significance.compare(by_query([0.5, 0.2]), by_query([0.5, 0.2]))
    assert found.p == {"t-test": 1.0, "randomization": 1.0} and (found.wins, found.ties, found.losses) == (0, 2, 0)


def test_one_query_has_no_t_test():
    assert significance.paired_t_test(np.array([0.3])) is None
    assert significance.paired_t_test(np.array([0.0])) == 1.0


@pytest.mark.parametrize("differences", [[0.5, 0.5, 0.5], [0.3, 0.1 + 0.2, 0.4 - 0.1]])
def test_equal_differences_make_t_infinite(differences, recwarn):
    assert significance.paired_t_test(np.array(differences)) == 0.0
    assert not recwarn.list
    assert significance.randomization_test(np.array(differences)) == 2 / 8


# ---- against SciPy

@pytest.mark.parametrize("queries", [2, 3, 10, 43, 300])
def test_t_test_is_scipys(queries):
    first, second = np.random.default_rng(queries).random((2, queries))
    assert significance.paired_t_test(first - second) == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)


@given(st.lists(value, min_size=2, max_size=9))
def test_exact_randomization_is_scipys(numbers):
    """Uses numbers with exact sums; otherwise, rounding makes SciPy count some equal sums as less extreme."""
    differences = np.round(np.array(numbers) * 64) / 64 - 0.25
    exact = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert significance.randomization_test(differences) == pytest.approx(exact.pvalue)


def test_a_sum_that_rounds_to_not_quite_zero_is_zero():
    assert significance.randomization_test(np.array([0, 0.25, 0.7, 0.1, 0.1, 0.1, 0.25, 0.5]) - 0.25) == 1.0


def test_sampled_randomization_is_near_scipys_and_repeatable():
    """SciPy enumerates all 2^20 assignments for 20 queries; 100,000 drawn ones must be within 5 standard errors."""
    differences = np.random.default_rng(5).normal(0.2, 0.5, 20)
    exact = stats.permutation_test((differences,), lambda x, axis: x.mean(axis=axis), permutation_type="samples",
                                   n_resamples=np.inf, vectorized=True, batch=2 ** 14).pvalue
    found = significance.randomization_test(differences)
    assert 0.01 < exact < 0.5 and abs(found - exact) < 5 * np.sqrt(exact * (1 - exact) / 100_000)
    assert significance.randomization_test(differences) == found
    assert significance.randomization_test(differences, seed=7) != found


def test_chunks_change_nothing_and_p_is_never_zero(monkeypatch):
    differences = np.random.default_rng(1).normal(0.1, 0.3, 40)
    exact = significance.randomization_test(differences, permutations=1000)
    monkeypatch.setattr(significance, "CHUNK", 8 * 40 * 5)
    assert significance.randomization_test(differences, permutations=1000) == exact
    assert significance.randomization_test(np.full(40, 0.1), permutations=999) == 1 / 1000


def test_exact_and_sampled_agree_at_the_border(monkeypatch):
    differences = np.random.default_rng(2).normal(0.2, 0.5, significance.EXACT_QUERIES)
    exact = significance.randomization_test(differences)
    monkeypatch.setattr(significance, "EXACT_QUERIES", 0)
    assert significance.randomization_test(differences) == pytest.approx(exact, abs=0.008)


# ---- properties

@given(pairs)
def test_swapping_the_runs_changes_signs_only(two):
    first, second = map(by_query, two)
    one, other = significance.compare(first, second), significance.compare(second, first)
    assert one.p == pytest.approx(other.p) and one.difference == -other.difference
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.wins + one.ties + one.losses == one.queries and one.means == other.means[::-1]


@given(pairs)
def test_p_is_a_probability_and_equals_the_definition(two):
    differences = np.array(two[0]) - np.array(two[1])
    t, p = significance.paired_t_test(differences), significance.randomization_test(differences)
    assert 0 < p <= 1 and (t is None or 0 <= t <= 1)
    sums = [abs(sum(sign * value for sign, value in zip(signs, differences)))
            for signs in product((1, -1), repeat=len(differences))]
    assert p == np.mean([total >= abs(differences.sum()) - 1e-9 for total in sums])


@given(p_values)
def test_holm_by_its_definition(numbers):
    """At a level, Holm rejects the smallest p-values as long as they are within level / (m, m - 1, ...)."""
    adjusted = significance.holm(numbers)
    for level in (0.01, 0.05, 0.2, 0.9):
        rejected, left = set(), len(numbers)
        for index in sorted(range(len(numbers)), key=numbers.__getitem__):
            if numbers[index] * left > level:
                break
            rejected.add(index)
            left -= 1
        assert {index for index, p in enumerate(adjusted) if p <= level} == rejected


@given(p_values, st.randoms())
def test_holm_keeps_order_and_does_not_depend_on_it(numbers, random):
    adjusted = significance.holm(numbers)
    assert all(p <= after <= min(1.0, p * len(numbers)) for p, after in zip(numbers, adjusted))
    ranked = [after for _, after in sorted(zip(numbers, adjusted))]
    assert ranked == sorted(ranked)
    shuffled = random.sample(list(zip(numbers, adjusted)), len(numbers))
    assert significance.holm([p for p, _ in shuffled]) == [after for _, after in shuffled]
