"""Statistics against published examples, SciPy, and simulations in which the truth is known."""

import jax
import numpy as np
import pytest
from scipy import stats

from megajax.errors import DataError
from megajax.evaluation.statistics import (
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_t,
    proportion_interval,
)

DRAWS = 2000


def answers(both, first_only, second_only, neither):
    """Two networks' right answers with the given counts of the four outcomes."""
    outcomes = [[1, 1], [1, 0], [0, 1], [0, 0]]
    return np.repeat(outcomes, [both, first_only, second_only, neither], axis=0).T


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(successes, total, low, high):
    """Table I of Newcombe, Statistics in Medicine 17 (1998)."""
    interval = proportion_interval(successes, total)
    np.testing.assert_allclose(interval, [successes / total, low, high], atol=5e-5)


def test_mcnemar_as_published():
    """Agresti, Categorical Data Analysis, section 10.1: approval of the prime minister."""
    result = mcnemar(*answers(794, 86, 150, 570))
    assert result.estimate == pytest.approx(-0.04)
    # His interval is Wald's, which at 1,600 people is the adjusted one to the digits he prints.
    np.testing.assert_allclose([result.low, result.high], [-0.059, -0.021], atol=6e-4)
    assert result.p_value == pytest.approx(2 * stats.binom.cdf(86, 236, 0.5), rel=1e-9)


def test_mcnemar_where_there_is_little_to_see():
    same = mcnemar([1, 0, 1], [1, 0, 1])
    assert (same.estimate, same.p_value) == (0, 1)
    assert same.low < 0 < same.high
    one = mcnemar([1], [0])
    assert (one.estimate, one.p_value) == (1, 1)
    assert one.high == 1


def test_turning_a_comparison_round_changes_only_the_sign():
    first, second = np.random.default_rng(0).random((2, 40)) < 0.6
    one, other = mcnemar(first, second), mcnemar(second, first)
    np.testing.assert_allclose(one, (-other.estimate, -other.high, -other.low, other.p_value))


def test_bootstrap_agrees_with_scipys():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.3, 1, 200), rng.normal(0, 1, 200)
    ours = paired_bootstrap(jax.random.key(0), first, second)
    theirs = stats.bootstrap(
        (first - second,), np.mean, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert ours.estimate == pytest.approx(np.mean(first - second))
    np.testing.assert_allclose([ours.low, ours.high], theirs, atol=0.01)
    # For a mean of 200 the bootstrap and the t-test are the same up to the drawing.
    assert ours.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=0.01)


def test_bootstrap_follows_its_key_and_sees_no_difference_where_there_is_none():
    first, second = np.random.default_rng(0).random((2, 50))
    draws = [paired_bootstrap(jax.random.key(k), first, second) for k in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert paired_bootstrap(jax.random.key(0), first, first) == (0, 0, 0, 1)


def test_blocks_of_the_bootstrap_make_no_difference_to_what_is_drawn(monkeypatch):
    first, second = np.random.default_rng(0).random((2, 50))
    whole = paired_bootstrap(jax.random.key(0), first, second, resamples=300)
    monkeypatch.setattr("megajax.evaluation.statistics._BLOCK", 64 * 50)
    assert paired_bootstrap(jax.random.key(0), first, second, resamples=300) == whole


def test_t_against_scipy():
    first, second = np.random.default_rng(0).normal(size=(2, 5))
    theirs = stats.ttest_rel(first, second)
    limits = theirs.confidence_interval(0.9)
    ours = paired_t(first, second, confidence=0.9)
    np.testing.assert_allclose(ours, [(first - second).mean(), *limits, theirs.pvalue])
    assert paired_t([0.7, 0.8], [0.6, 0.7])[1:] == (pytest.approx(0.1), pytest.approx(0.1), 0)
    assert paired_t([0.7, 0.8], [0.7, 0.8]) == (0, 0, 0, 1)
    assert paired_t([0.7], [0.6])[0] == pytest.approx(0.1)
    assert np.isnan(paired_t([0.7], [0.6])[1:]).all()
    assert np.isnan(mean_interval([0.7])[1:]).all()


def test_holm_by_its_step_down_definition():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7):
        p_values = rng.random(count) * 0.1
        adjusted = holm(p_values)
        for level in np.linspace(0.001, 0.2, 50):
            rejected, left = set(), count
            for i in np.argsort(p_values):
                if p_values[i] > level / left:
                    break
                rejected.add(int(i))
                left -= 1
            assert set(np.flatnonzero(adjusted <= level)) == rejected
    np.testing.assert_allclose(holm([0.6, np.nan, 0.01]), [0.6, np.nan, 0.02])
    assert holm([]).size == 0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(DataError, match=r"shapes \[3\] and \[2\]"):
        mcnemar([1, 0, 1], [1, 0])
    with pytest.raises(DataError, match="at least one"):
        paired_t([], [])
    with pytest.raises(DataError, match="3 of 2 examples"):
        proportion_interval(3, 2)
    with pytest.raises(DataError, match="mean of"):
        mean_interval([])


@pytest.fixture(scope="module")
def planted():
    """2,000 draws of 600 examples for networks that differ by 4 points, and for equal ones."""
    shares = {0.04: [0.72, 0.10, 0.06, 0.12], 0.0: [0.70, 0.10, 0.10, 0.10]}
    rng = np.random.default_rng(0)
    return {truth: rng.multinomial(600, share, size=DRAWS) for truth, share in shares.items()}


def covered(intervals, truth):
    low, high = np.array([interval[1:3] for interval in intervals]).T
    return np.mean((low <= truth) & (truth <= high))


def test_intervals_cover_a_planted_difference(planted):
    for truth, draws in planted.items():
        results = [mcnemar(*answers(*counts)) for counts in draws]
        assert 0.93 <= covered(results, truth) <= 0.97
        if truth == 0:  # p-values are as rare as they say; an exact test keeps below its level
            assert 0.03 <= np.mean([result.p_value <= 0.05 for result in results]) <= 0.05
        else:
            assert np.mean([result.p_value <= 0.05 for result in results]) > 0.5
        accuracies = [proportion_interval(counts[0] + counts[1], 600) for counts in draws]
        assert 0.93 <= covered(accuracies, 0.82 if truth else 0.80) <= 0.97


def test_the_bootstrap_covers_a_planted_difference(planted):
    for truth, draws in planted.items():
        keys = jax.random.split(jax.random.key(0), DRAWS)
        results = [
            paired_bootstrap(key, *answers(*counts), resamples=1000)
            for key, counts in zip(keys, draws, strict=True)
        ]
        assert 0.93 <= covered(results, truth) <= 0.97
        if truth == 0:
            assert 0.03 <= np.mean([result.p_value <= 0.05 for result in results]) <= 0.07


def test_five_seeds_cover_a_planted_difference():
    """Seeds differ more among themselves than the methods do, which is what pairing takes away."""
    rng = np.random.default_rng(0)
    seeds = 0.8 + 0.05 * rng.normal(size=(DRAWS, 1, 5))
    first, second = np.moveaxis(seeds + 0.01 * rng.normal(size=(DRAWS, 2, 5)), 1, 0)
    for truth in (0.0, 0.02):
        results = [paired_t(a + truth, b) for a, b in zip(first, second, strict=True)]
        assert 0.93 <= covered(results, truth) <= 0.97
        if truth == 0:
            assert 0.03 <= np.mean([result.p_value <= 0.05 for result in results]) <= 0.07
    means = [mean_interval(row) for row in first]
    assert 0.93 <= covered(means, 0.8) <= 0.97
