"""Searches for genes that pick: flips, planted optima, probabilities, what is refused."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searches import assert_it_goes_on_bit_identical, started

import megajax as mj
from megajax.errors import ConfigError
from megajax.merging.masks import masks
from megajax.search.binary import PBIL, OnePlusOne, _towards
from megajax.search.loop import Limits, _generations, run
from megajax.search.methods import EvolutionConfig, make_search
from megajax.search.operators import flip
from megajax.types import bind

KEY = jax.random.key(4)


def agreement(target, genes):
    """OneMax with a planted optimum: the share of genes that pick the target's parent."""
    return (jnp.argmax(genes, axis=-1) == target).mean(axis=-1, dtype=jnp.float32)


def planted(num_genes=40, K=2):
    return jax.random.randint(jax.random.key(9), (num_genes,), 0, K)


def genes_of(size=16, num_genes=40, K=2):
    return jax.nn.one_hot(jax.random.randint(KEY, (size, num_genes), 0, K), K)


def one_plus(size=1, num_genes=40):
    return OnePlusOne(agreement, bind(flip, rate=1 / num_genes), size)


SEARCHES = [one_plus(), one_plus(8), PBIL(agreement, 16)]


# Flips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [2, 3, 5])
def test_a_flip_is_another_parent_drawn_alike(K):
    genes = genes_of(300, 100, K)
    flipped = np.asarray(flip(KEY, genes, rate=0.3))
    assert set(np.unique(flipped)) == {0.0, 1.0}
    np.testing.assert_array_equal(flipped.sum(axis=-1), 1)
    step = (flipped.argmax(axis=-1) - np.asarray(genes).argmax(axis=-1)) % K
    assert abs((step > 0).mean() - 0.3) < 0.01
    shares = np.bincount(step.ravel(), minlength=K)[1:] / (step > 0).sum()
    np.testing.assert_allclose(shares, 1 / (K - 1), atol=0.02)
    every = flip(KEY, genes, rate=1.0)
    assert (jnp.argmax(every, axis=-1) != jnp.argmax(genes, axis=-1)).all()


@pytest.mark.parametrize("num_genes", [50, 20_000])  # hit one by one, and found by their gaps
def test_one_gene_in_n_flips_on_average_and_none_in_a_third_of_the_children(num_genes):
    size = 1_000 if num_genes == 50 else 400
    parent = jax.nn.one_hot(jnp.zeros((size, num_genes), jnp.int32), 2)
    flips = np.asarray(flip(KEY, parent, rate=1 / num_genes)[..., 1].sum(axis=1))
    assert abs(flips.mean() - 1) < 4 / np.sqrt(size)  # the variance of a binomial is 1 - 1/n
    assert abs((flips == 0).mean() - np.exp(-1)) < 4 * 0.5 / np.sqrt(size)
    assert abs(flips.var() - 1) < 0.3


# The searches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("K", [2, 3])
def test_a_planted_optimum_is_found(search, K):
    target = planted(K=K)
    start = started(search, genes_of(K=K), target)
    state, _ = run(KEY, search, start, target, Limits(1500, per_call=500))
    assert float(state.best.fitness) == 1
    np.testing.assert_array_equal(state.best.genes.argmax(axis=-1), target)


def test_the_time_to_the_optimum_is_the_theorys():
    """(1+1) on OneMax takes e n ln n + O(n) on average (Droste, Jansen and Wegener 2002)."""
    n, search = 40, one_plus()
    zeros, target = jax.nn.one_hot(jnp.zeros((1, n), jnp.int32), 2), jnp.ones(n, jnp.int32)

    @jax.jit
    def hitting_time(key):
        def unfinished(carry):
            return carry[1].best.fitness < 1

        def step(carry):
            key, state = carry
            key, now = jax.random.split(key)
            return key, search.step(now, state, target)[0]

        done = jax.lax.while_loop(unfinished, step, (key, search.init(key, zeros, target)))
        return done[1].generation

    times = np.array([int(hitting_time(key)) for key in jax.random.split(KEY, 30)])
    assert 0.7 < times.mean() / (np.e * n * np.log(n)) < 1.1


def test_a_child_that_is_equal_replaces_its_parent_and_a_worse_one_does_not():
    search = OnePlusOne(lambda _, genes: jnp.zeros(len(genes)), bind(flip, rate=0.5), 3)
    start = started(search, genes_of(4), None)
    assert start.population.fitness.shape == (1,)
    after, _ = search.step(KEY, start, None)
    assert not np.array_equal(after.population.genes, start.population.genes)
    chex.assert_trees_all_equal(after.best, start.best)  # the earlier of equals
    best, worse = one_plus(3), jnp.argmax(genes_of(1)[0], axis=-1)
    start = started(best, genes_of(1), worse)  # at the optimum
    state, infos = run(KEY, best, start, worse, Limits(20, per_call=20))
    chex.assert_trees_all_equal(state.population, start.population)
    assert infos.evaluations[-1] == 1 + 20 * 3


def test_probabilities_stay_a_distribution_and_forget_nothing_for_ever():
    search, target = PBIL(agreement, 16, mutation_rate=0.1), planted(K=3)
    state = started(search, genes_of(16, K=3), target)
    for _ in range(3):
        state, _ = run(
            KEY, search, state, target, Limits(int(state.generation) + 200, per_call=200)
        )
        chances = np.asarray(state.memory)
        assert chances.shape == (40, 3)
        assert chances.min() >= 0
        assert chances.max() <= 1
        np.testing.assert_allclose(chances.sum(axis=-1), 1, atol=1e-4)
    # Mutation pulls away from certainty: 10 % of the genes by 5 % in each generation.
    right = np.take_along_axis(chances, np.asarray(target)[:, None], axis=1)
    assert 0.9 < right.mean() < 1


def test_a_generation_of_pbil_is_that_of_its_paper():
    """Learning from the best, more where the worst differs, then mutation (none here)."""
    search, target = PBIL(agreement, 16, mutation_rate=0.0), planted()
    start = started(search, genes_of(16), target)
    after, _ = search.step(KEY, start, target)
    genes, fitness = np.asarray(after.population.genes), np.asarray(after.population.fitness)
    best, worst = genes[fitness.argmax()], genes[fitness.argmin()]
    expected = 0.9 * np.asarray(start.memory) + 0.1 * best
    differ = (best != worst).any(axis=-1)
    expected[differ] = expected[differ] * (1 - 0.075) + 0.075 * best[differ]
    np.testing.assert_allclose(after.memory, expected, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"has 5 individuals.*as many as offspring, 16"):
        started(search, genes_of(5), target)
    # Draws follow the probabilities.
    chance = jnp.array([[0.9, 0.1], [0.25, 0.75]])
    drawn = PBIL(agreement, 4_000)._drawn(KEY, chance)
    np.testing.assert_allclose(drawn.mean(axis=0), chance, atol=0.03)
    np.testing.assert_allclose(_towards(chance, jnp.zeros(2), 0.0), chance)


@pytest.mark.parametrize("search", [one_plus(6), PBIL(agreement, 6)])
def test_what_is_no_number_never_wins_and_teaches_nothing(search):
    def broken(target, genes):
        fitness = agreement(target, genes)
        return jnp.where(fitness > 0.61, jnp.nan, fitness)

    search = replace(search, evaluate=broken)
    target = planted()
    state, infos = run(
        KEY, search, started(search, genes_of(6), target), target, Limits(100, per_call=50)
    )
    assert infos.invalid.sum() > 0
    assert 0 < float(state.best.fitness) < 0.61
    dead = replace(search, evaluate=dead_end)
    start = started(dead, genes_of(6), target)
    after, noted = dead.step(KEY, start, target)
    assert int(noted.invalid) == 6
    assert np.isneginf(after.best.fitness)
    if isinstance(search, PBIL):
        assert np.isfinite(after.memory).all()


def dead_end(target, genes):
    return jnp.full(len(genes), jnp.nan)


@pytest.mark.parametrize("search", SEARCHES[1:])
@pytest.mark.parametrize("stop", [1, 6])
def test_it_goes_on_bit_identical(search, stop):
    start = started(search, genes_of(), planted())
    assert_it_goes_on_bit_identical(KEY, search, start, planted(), stop)


@pytest.mark.parametrize("make", [one_plus, lambda: PBIL(agreement, 12)])
def test_it_is_a_value_and_compiles_once(make):
    assert make() == make()
    assert hash(make()) == hash(make())
    before = _generations._cache_size()
    for target in (planted(), 1 - planted()):
        run(KEY, make(), started(make(), genes_of(12), target), target, Limits(7, per_call=7))
    assert _generations._cache_size() == before + 1


# Through the configuration ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["one_plus_one", "pbil"])
def test_it_is_for_genes_that_pick(method):
    variables, config = {"w": jnp.zeros(30)}, EvolutionConfig(method=method, population_size=6)
    space = masks(variables, 3, granularity="element", binary=True)
    search = make_search(config, space, agreement)
    assert search.num_offspring == 6
    assert search.cost(100) == 600
    if method == "one_plus_one":
        assert dict(search.mutate.options) == {"rate": 1 / 30}
        assert make_search(config.replace(offspring=2), space, agreement).num_offspring == 2
    mixing = masks(variables, 3, granularity="element")
    with pytest.raises(ConfigError, match=f"'{method}': it is for genes that pick"):
        make_search(config, mixing, agreement)


@pytest.mark.parametrize("method", ["one_plus_one", "pbil"])
def test_a_planted_merge_is_found(method):
    """Each parent has half of the right columns: a network that picks right is right everywhere."""
    right = np.eye(12, dtype=np.float32)
    picks = np.arange(12) % 3 == 0
    parents = [right * np.where(picks, 1, -1), right * np.where(picks, -1, 1)]
    result = mj.merge(
        KEY,
        lambda w, x: x @ w,
        [np.float32(parent) for parent in parents],
        (right, np.arange(12)),
        align=mj.AlignConfig(method="none"),
        genome=mj.GenomeConfig(binary=True),
        fitness=mj.FitnessConfig(metric="accuracy"),
        evolution=EvolutionConfig(
            method=method, population_size=12, generations=120, generations_per_chunk=120
        ),
    )
    assert result.fitness == 1
    np.testing.assert_array_equal(result.variables, right)
    assert result.evaluations == 12 * 121
