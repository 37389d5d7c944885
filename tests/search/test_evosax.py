"""Random search and evosax's: driven by the same loop, held to the promises of the genetic one."""

import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searches import assert_it_goes_on_bit_identical, started

from megajax.errors import ConfigError
from megajax.merging.masks import Masks, masks
from megajax.search.evosax import Evosax
from megajax.search.loop import Limits, first_state, run
from megajax.search.methods import EvolutionConfig, make_search
from megajax.search.sampling import RandomSearch

KEY = jax.random.key(0)
P = 12
SPACE = masks({"w": np.zeros(5, np.float32)}, 2, granularity="element")
OPTIMUM = jnp.array([0.0, 0.3, 1.0, 0.8, 0.5])  # of the first parent, at the border and inside
WHOLE = (OPTIMUM, jnp.int32(0))


def planted(problem, genes):
    """The nearer to the optimum, the higher; of three individuals in turn some are no number."""
    optimum, broken = problem
    fitness = -jnp.sum((genes[:, :, 0] - optimum) ** 2, axis=1)
    every = jnp.arange(len(fitness)) % 3
    values = jnp.array([jnp.nan, jnp.inf, -jnp.inf])[every]
    return jnp.where(every < broken, values, fitness), genes[:, 0, 0]


def first_genes(size=P, space=SPACE):
    return jax.jit(space.init, static_argnums=1)(jax.random.key(1), size)


def score(genes):
    return np.asarray(planted(WHOLE, jnp.asarray(genes))[0])


# Random search -----------------------------------------------------------------------------------


def test_random_search_draws_what_a_first_population_is_made_of():
    seen = []

    def evaluate(problem, genes):
        jax.debug.callback(lambda genes: seen.append(np.asarray(genes)), genes)
        return planted(problem, genes)

    search = RandomSearch(evaluate, SPACE, num_offspring=P)
    state, infos = run(KEY, search, started(search, first_genes(), WHOLE), WHOLE, Limits(3))
    jax.effects_barrier()
    _, *drawn = seen
    assert infos.evaluations.tolist() == [2 * P, 3 * P, 4 * P]
    for g, genes in enumerate(drawn):  # nothing but masks of the genome's own, from each draw anew
        np.testing.assert_allclose(genes.sum(axis=-1), 1, atol=1e-6)
        home = np.abs(genes - np.eye(2)[:, None, None]).max(axis=(2, 3)).min(axis=0)
        assert home.min() > 0  # no parent again
        assert not any(np.array_equal(genes, other) for other in drawn[:g])
    fitness = score(np.concatenate(seen))
    assert float(state.best.fitness) == pytest.approx(fitness.max())
    np.testing.assert_allclose(state.population.fitness, np.sort(fitness)[::-1][:P], rtol=1e-5)


def test_weights_cannot_be_drawn():
    class Whole:
        gene_ndim = None

    with pytest.raises(ConfigError, match=r"evolution.method is 'random': weights cannot"):
        make_search(EvolutionConfig(method="random"), Whole(), planted, None)


# evosax ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["CMA_ES", "DifferentialEvolution"])
def search(request):
    """One search for all tests: its problem is an argument of the compiled program."""
    return Evosax(request.param, planted, SPACE, num_offspring=P)


def test_a_planted_optimum_is_found_and_all_is_counted(search):
    limits = Limits(60, per_call=10)
    state, infos = run(KEY, search, started(search, first_genes(), WHOLE), WHOLE, limits)
    np.testing.assert_allclose(state.best.genes[:, 0], OPTIMUM, atol=0.1)
    np.testing.assert_allclose(state.best.genes.sum(axis=1), 1, atol=1e-5)
    assert (state.population.genes >= 0).all()
    assert infos.evaluations.tolist() == [P * (g + 2) for g in range(60)]
    assert (np.diff(infos.best_ever) >= 0).all()
    assert float(state.best.aux) == float(state.best.genes[0, 0])
    np.testing.assert_allclose(score(state.best.genes[None])[0], state.best.fitness, atol=1e-6)


def test_parents_are_scored_first_and_the_best_is_never_lost(search):
    # At the optimum is the second parent; everything else is worse.
    problem = jnp.zeros(5), jnp.int32(0)
    start = started(search, first_genes(), problem)
    np.testing.assert_allclose(start.population.fitness[:2], [-5, 0])
    state, _ = run(KEY, search, start, problem, Limits(5))
    np.testing.assert_array_equal(state.best.genes, first_genes()[1])
    assert float(state.best.fitness) == 0
    assert int(state.stale) == 5


def test_continued_it_ends_bit_identical_and_another_key_does_not(search):
    start = started(search, first_genes(), WHOLE)
    assert_it_goes_on_bit_identical(KEY, search, start, WHOLE, 3)
    one, other = (
        run(jax.random.key(seed), search, start, WHOLE, Limits(7, per_call=10))[0].population
        for seed in (0, 1)
    )
    assert not np.array_equal(other.genes, one.genes)


def test_what_is_no_number_never_wins_and_teaches_nothing(search):
    problem = OPTIMUM, jnp.int32(2)  # two in three
    limits = Limits(20, per_call=10)
    state, infos = run(KEY, search, started(search, first_genes(), problem), problem, limits)
    assert (infos.invalid == 8).all()
    assert (infos.valid == 4).all()
    np.testing.assert_allclose(score(state.best.genes[None])[0], state.best.fitness, atol=1e-6)
    assert float(state.best.fitness) > float(infos.best_ever[0])
    assert np.isfinite(state.population.genes).all()

    after, noted = jax.jit(search.step)(KEY, state, (OPTIMUM, jnp.int32(3)))  # all
    assert (int(noted.invalid), int(noted.valid)) == (P, 0)
    chex.assert_trees_all_equal(after.memory, state.memory)
    chex.assert_trees_all_equal(after.best, state.best)


def test_equal_choices_are_equal_searches_and_names_are_those_of_evosax(search):
    named = {"CMA_ES": "cma_es", "DifferentialEvolution": "differential_evolution"}
    config = EvolutionConfig(method=named[search.algorithm], population_size=P)
    made = make_search(config, SPACE, planted, None)
    assert made == search
    assert hash(made) == hash(search)
    assert made != make_search(config.replace(population_size=9), SPACE, planted, None)


@pytest.mark.parametrize("K", [2, 3, 5])
def test_an_algorithm_sees_the_numbers_that_are_free_and_no_others(K):
    space = Masks(SPACE.labels, K, 5)
    encode, decode = Evosax("CMA_ES", planted, space, P)._coordinates()
    genes = space.sample(KEY, (7, 5, K), jnp.float32)
    free = encode(genes)
    assert free.shape == (7, 5, K - 1)
    np.testing.assert_allclose(decode(free), genes, atol=1e-6)
    distances = np.linalg.norm(np.asarray(free[0] - free[1]))  # an orthonormal basis keeps them
    np.testing.assert_allclose(distances, np.linalg.norm(genes[0] - genes[1]), rtol=1e-5)
    np.testing.assert_allclose(encode(jnp.full((1, 5, K), 1 / K)), 0, atol=1e-6)


@pytest.mark.slow
def test_binary_genes_stay_binary():
    space = masks({"w": np.zeros(4, np.float32)}, 3, granularity="element", binary=True)

    def of_second(problem, genes):
        return genes[:, :, 1].sum(axis=1)

    search = Evosax("DifferentialEvolution", of_second, space, num_offspring=8)
    state, _ = run(KEY, search, started(search, first_genes(8, space), None), None, Limits(3))
    assert set(np.unique(state.population.genes)) <= {0.0, 1.0}
    assert (state.population.genes.sum(axis=-1) == 1).all()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"algorithm": "CMAES"}, "no algorithm 'CMAES'; did you mean CMA_ES"),
        ({"algorithm": "xyz"}, "no algorithm 'xyz'; there are "),
        ({"algorithm": "SV_CMA_ES"}, "searcher SV_CMA_ES: .*num_populations"),
        (
            {"algorithm": "SV_CMA_ES", "options": (("num_populations", 2),)},
            "SV_CMA_ES starts neither from a mean nor",
        ),
        ({"algorithm": "Open_ES", "num_offspring": 7}, "searcher Open_ES: .*must be even"),
        ({"parameters": (("sigma", 1.0),)}, "searcher CMA_ES: .*sigma"),
        ({"num_offspring": 9}, "first population has 8 individuals: this search needs .* 9"),
    ],
)
def test_what_evosax_cannot_do_is_one_line(choices, message):
    choices = {"algorithm": "CMA_ES", "num_offspring": 8, **choices}
    search = Evosax(evaluate=planted, space=SPACE, **choices)
    genes = first_genes(7 if search.num_offspring == 7 else 8)
    with pytest.raises(ConfigError, match=message) as error:
        first_state(search, KEY, genes, WHOLE)
    assert "\n" not in str(error.value)


def test_without_evosax_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evosax", None)
    monkeypatch.setitem(sys.modules, "evosax.algorithms", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[searchers\]'"):
        make_search(EvolutionConfig(method="cma_es"), SPACE, planted, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "CR_FM_NES", "GradientlessDescent", "HillClimbing", "MA_ES", "MR15_GA", "Open_ES", "PSO",
        "SAMR_GA", "SNES", "Sep_CMA_ES", "SimpleES", "SimpleGA", "SimulatedAnnealing", "xNES",
        "iAMaLGaM_Univariate",
    ],
)  # fmt: skip
def test_the_other_algorithms_improve_on_the_first_population(name):
    search = Evosax(name, planted, SPACE, num_offspring=16)
    start = started(search, first_genes(16), WHOLE)
    state, infos = run(KEY, search, start, WHOLE, Limits(40))
    assert float(state.best.fitness) > float(start.best.fitness)
    assert int(state.counts.networks) == 16 * 41
    assert not infos.invalid.any()
