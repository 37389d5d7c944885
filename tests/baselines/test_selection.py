"""Best parent and greedy soup against the recipe, written down a second time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.baselines import Given, greedy_soup, uniform_average
from megajax.baselines.given import best_of
from megajax.errors import ParentsError


def recipe(parents, score):
    """Recipe 1 of the paper, on flat arrays."""
    ranked = sorted(enumerate(parents), key=lambda pair: score(pair[1]), reverse=True)
    ingredients = [ranked[0]]
    for candidate in ranked[1:]:
        trial = np.mean([network for _, network in [*ingredients, candidate]], axis=0)
        if score(trial) >= score(np.mean([network for _, network in ingredients], axis=0)):
            ingredients.append(candidate)
    return [k for k, _ in ingredients], np.mean([network for _, network in ingredients], axis=0)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_soup_is_the_papers_recipe(seed):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=3)
    parents = [np.float32(target + rng.normal(size=3)) for _ in range(6)]
    calls = []

    def score(network):
        calls.append(1)
        return float(-((np.float64(network) - target) ** 2).sum())

    soup = greedy_soup(parents, score)
    assert len(calls) == soup.evaluations == 11
    members, mean = recipe(parents, score)
    assert soup.members == members
    np.testing.assert_allclose(soup.variables, mean, rtol=1e-5)
    assert soup.score >= max(map(score, parents))


def test_equal_scores_join_and_failures_do_not():
    parents = [np.float32(x) for x in (np.nan, 1.0, 2.0, 3.0)]
    soup = greedy_soup(parents, lambda w: math.nan if np.isnan(w) else 7.0)
    assert soup.members == [1, 2, 3]
    assert float(soup.variables) == 2.0
    assert soup.score == 7.0


def test_only_averages_are_prepared_and_scored_as_prepared():
    averaged = []

    def average(networks):
        averaged.append([float(network) for network in networks])
        return uniform_average(networks) + 10

    soup = greedy_soup([np.float32(1), np.float32(3)], float, average)
    assert averaged == [[3.0, 1.0]]
    assert float(soup.variables) == soup.score == 12.0
    alone = greedy_soup([np.float32(1), np.float32(3)], lambda w: -abs(float(w) - 3))
    assert alone.members == [1]
    assert float(alone.variables) == 3.0


def test_networks_that_do_not_fit_are_named():
    with pytest.raises(ParentsError, match="leaf w has shape"):
        greedy_soup([{"w": np.zeros(2)}, {"w": np.zeros(3)}], lambda network: 0.0)


def test_the_first_of_equals_is_best_and_no_number_is_worst():
    nan, inf = math.nan, math.inf
    assert best_of([nan, inf, 1.0, 1.0], float) == (1.0, 2, [-inf, -inf, 1.0, 1.0])
    assert best_of([nan, nan], float) == (nan, 0, [-inf, -inf])
    assert best_of((x for x in (1.0, 2.0)), float)[0] == 2.0
    with pytest.raises(ParentsError, match="no networks"):
        best_of([], float)


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(10, 4)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    labels = rng.integers(0, 3, 10)
    problem = mj.problem_for(
        lambda w, x: x @ w,
        [w, -w],
        (x, labels),
        genome=mj.GenomeConfig(granularity="leaf"),
        fitness=mj.FitnessConfig(metric="accuracy", batch_size=4),
    )
    evolution = mj.EvolutionConfig()
    return (
        x,
        w,
        labels,
        Given(None, [w, -w], None, None, frozenset(), problem, problem, 0, evolution),
    )


def test_padding_does_not_count_for_the_score_and_no_number_is_the_worst(given):
    x, w, labels, given = given
    for network in (w, -w, w[::-1].copy()):
        expected = ((x @ network).argmax(axis=1) == labels).mean()
        assert given.score(network) == pytest.approx(expected)
    problem = mj.problem_for(
        lambda w, x: x @ w * jnp.nan, [w, -w], (x, labels), genome=mj.GenomeConfig()
    )
    assert given._replace(problem=problem).score(w) == -math.inf
