"""Other searchers: driven by the same loop, held to the same promises as the genetic algorithm."""

import math
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from megajax.baselines import best_point, from_evosax, random_search, simplex_lattice
from megajax.errors import ConfigError
from megajax.merging.genome import masks
from megajax.search.genetic import run

KEY = jax.random.key(0)
P = 12


def shares(key, num):
    """Both parents, their mean, then masks drawn evenly; compiles faster than Dirichlet draws."""
    drawn = jax.random.uniform(key, (num, 5))
    first = jnp.concatenate([jnp.array([[1.0] * 5, [0.0] * 5, [0.5] * 5]), drawn[3:]])
    return jnp.stack([first, 1 - first], axis=-1)


GENOME = masks({"w": jnp.zeros((2, 5))}, granularity="element")
SMALL = GENOME._replace(init=shares)
OPTIMUM = jnp.array([0.0, 0.3, 1.0, 0.8, 0.5])  # of the first parent, at the border and inside
FIRST = shares(jax.random.key(1), P)


def planted(genes):
    return -jnp.sum((genes[:, :, 0] - OPTIMUM) ** 2, axis=1), ()


@pytest.mark.parametrize("num_parents", [2, 3, 4, 7])
@pytest.mark.parametrize("limit", [8, 9, 40, 101])
def test_the_lattice_covers_the_simplex_within_its_limit(num_parents, limit):
    points = simplex_lattice(num_parents, limit)
    assert points.shape[1] == num_parents
    assert len(points) <= limit
    np.testing.assert_allclose(points.sum(axis=1), 1, atol=1e-6)
    assert (points >= 0).all()
    assert len(np.unique(points.round(6), axis=0)) == len(points)
    np.testing.assert_array_equal(points[:num_parents], np.eye(num_parents))
    np.testing.assert_allclose(points[num_parents], 1 / num_parents)
    # Steps of 1 / m, and no finer lattice would have kept within the limit.
    inner = points[num_parents + 1 :]
    m = round(1 / inner[inner > 0].min()) if len(inner) else 1
    np.testing.assert_allclose(inner * m, np.round(inner * m), atol=1e-5)
    assert len(points) <= limit < math.comb(m + num_parents, num_parents - 1) + 1 or m == 1


@pytest.mark.parametrize("limit", [3, 4, 21, 22])
def test_two_parents_make_an_evenly_cut_line(limit):
    shares = np.sort(simplex_lattice(2, limit)[:, 1])
    odd = limit - (limit % 2 == 0)
    np.testing.assert_allclose(shares, np.linspace(0, 1, odd), atol=1e-6)


def test_a_limit_without_room_for_the_mean_is_refused():
    with pytest.raises(ConfigError, match=r"budget is 3: 3 parents and their mean need at least 4"):
        simplex_lattice(3, 3)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 99])
def test_best_point_is_argmax_whatever_the_batch(batch_size):
    points = jnp.asarray(np.random.default_rng(0).normal(size=(10, 2)), jnp.float32)

    def evaluate(genes):
        fitness = genes.sum(axis=1)
        return jnp.where(fitness > 1, jnp.nan, fitness), ()

    genes, fitness = best_point(evaluate, points, batch_size=batch_size)
    sums = np.asarray(points.sum(axis=1))
    expected = np.where(sums > 1, -np.inf, sums)
    np.testing.assert_allclose(fitness, expected, rtol=1e-6)
    np.testing.assert_array_equal(genes, points[expected.argmax()])


# Random search -----------------------------------------------------------------------------------


def test_random_search_draws_what_a_first_population_is_made_of():
    seen = []

    def evaluate(genes):
        jax.debug.callback(lambda genes: seen.append(np.asarray(genes)), genes)
        return planted(genes)

    search = random_search(evaluate, SMALL, num_offspring=P)
    state, infos = run(KEY, search, search.init(KEY, FIRST), 3)
    jax.effects_barrier()
    _, *drawn = seen
    assert infos.evaluations.tolist() == [2 * P, 3 * P, 4 * P]
    for g, genes in enumerate(drawn):  # nothing but masks of the genome's own, from each draw anew
        np.testing.assert_allclose(genes.sum(axis=-1), 1, atol=1e-6)
        home = np.abs(genes - np.eye(2)[:, None, None]).max(axis=(2, 3)).min(axis=0)
        assert home.min() > 0  # no parent again
        assert not any(np.array_equal(genes, other) for other in drawn[:g])
    everything = np.concatenate(seen)
    fitness = np.asarray(planted(jnp.asarray(everything))[0])
    assert float(state.best.fitness) == pytest.approx(fitness.max())
    np.testing.assert_allclose(state.population.fitness, np.sort(fitness)[::-1][:P], rtol=1e-5)


def test_random_search_needs_room_for_the_parents():
    with pytest.raises(ConfigError, match="at least 3 are needed"):
        random_search(planted, GENOME, num_offspring=2)


# evosax ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["CMA_ES", "DifferentialEvolution"])
def searcher(request):
    """One compiled search for all tests; the fitness is an argument of its evaluation."""

    def evaluate(optimum, broken, genes):
        fitness = -jnp.sum((genes[:, :, 0] - optimum) ** 2, axis=1)
        every = jnp.arange(len(fitness)) % 3 < broken
        values = jnp.array([jnp.nan, jnp.inf, -jnp.inf])[jnp.arange(len(fitness)) % 3]
        return jnp.where(every, values, fitness), genes[:, 0, 0]

    search = from_evosax(
        request.param, Partial(evaluate, OPTIMUM, jnp.int32(0)), SMALL, num_offspring=P
    )

    def with_fitness(optimum, broken=0):
        swap = Partial(evaluate, optimum, jnp.int32(broken))
        init, step = search.init, search.step
        return search._replace(
            init=Partial(init.func, swap, *init.args[1:]),
            step=Partial(step.func, swap, *step.args[1:]),
        )

    return with_fitness


def test_a_planted_optimum_is_found_and_all_is_counted(searcher):
    search = searcher(OPTIMUM)
    state, infos = run(KEY, search, search.init(KEY, FIRST), 60)
    np.testing.assert_allclose(state.best.genes[:, 0], OPTIMUM, atol=0.1)
    np.testing.assert_allclose(state.best.genes.sum(axis=1), 1, atol=1e-5)
    assert (state.population.genes >= 0).all()
    assert infos.evaluations.tolist() == [P * (g + 2) for g in range(60)]
    assert (np.diff(infos.best_ever) >= 0).all()
    assert float(state.best.aux) == float(state.best.genes[0, 0])
    np.testing.assert_allclose(planted(state.best.genes[None])[0], state.best.fitness, atol=1e-6)


def test_parents_are_scored_first_and_the_best_is_never_lost(searcher):
    # At the optimum is the second parent; everything else is worse.
    search = searcher(jnp.zeros(5))
    start = search.init(KEY, FIRST)
    np.testing.assert_allclose(start.population.fitness[:2], [-5, 0])
    state, _ = run(KEY, search, start, 5)
    np.testing.assert_array_equal(state.best.genes, FIRST[1])
    assert float(state.best.fitness) == 0
    assert int(state.stale) == 5


def test_continued_it_ends_bit_identical_and_another_key_does_not(searcher):
    search = searcher(OPTIMUM)
    start = search.init(KEY, FIRST)
    straight, infos = run(KEY, search, start, 7)
    half, early = run(KEY, search, start, 3)
    resumed, late = run(KEY, search, half, 7)
    chex.assert_trees_all_equal(resumed, straight)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), early, late)
    chex.assert_trees_all_equal(joined, infos)
    other, _ = run(jax.random.key(1), search, start, 7)
    assert not np.array_equal(other.population.genes, straight.population.genes)


def test_what_is_no_number_never_wins_and_teaches_nothing(searcher):
    search = searcher(OPTIMUM, broken=2)  # two in three
    state, infos = run(KEY, search, search.init(KEY, FIRST), 20)
    assert (infos.invalid == 8).all()
    np.testing.assert_allclose(planted(state.best.genes[None])[0], state.best.fitness, atol=1e-6)
    assert float(state.best.fitness) > float(infos.best_ever[0])
    assert np.isfinite(state.population.genes).all()

    search = searcher(OPTIMUM, broken=3)  # all
    after, info = jax.jit(search.step)(KEY, state)
    assert int(info.invalid) == P
    chex.assert_trees_all_equal(after.strategy, state.strategy)
    chex.assert_trees_all_equal(after.best, state.best)


@pytest.mark.slow
def test_binary_genes_stay_binary():
    genome = masks({"w": jnp.zeros((3, 4))}, granularity="element", binary=True)
    search = from_evosax(
        "DifferentialEvolution",
        lambda genes: (genes[:, :, 1].sum(axis=1), ()),
        genome,
        num_offspring=8,
    )
    state, _ = run(KEY, search, search.init(KEY, genome.init(KEY, 8)), 3)
    assert set(np.unique(state.population.genes)) <= {0.0, 1.0}
    assert (state.population.genes.sum(axis=-1) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "CMAES"}, "no algorithm 'CMAES'; did you mean CMA_ES"),
        ({"algorithm": "xyz"}, "no algorithm 'xyz'; there are "),
        ({"algorithm": "SV_CMA_ES"}, "searcher SV_CMA_ES: .*num_populations"),
        (
            {"algorithm": "SV_CMA_ES", "options": {"num_populations": 2}},
            "SV_CMA_ES starts neither from a mean nor",
        ),
        ({"algorithm": "Open_ES", "num_offspring": 7}, "searcher Open_ES: .*must be even"),
        ({"algorithm": "CMA_ES", "parameters": {"sigma": 1.0}}, "searcher CMA_ES: .*sigma"),
        ({"algorithm": "CMA_ES", "num_offspring": 2}, "at least 3 are needed"),
    ],
)
def test_what_evosax_cannot_do_is_one_line(arguments, message):
    options = {"num_offspring": 8, **arguments}
    with pytest.raises(ConfigError, match=message):
        from_evosax(options.pop("algorithm"), planted, GENOME, **options)


def test_another_size_of_the_first_population_is_refused():
    search = from_evosax("CMA_ES", planted, GENOME, num_offspring=P)
    with pytest.raises(ConfigError, match="first population has 7 individuals"):
        search.init(KEY, FIRST[:7])


def test_without_evosax_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "evosax", None)
    with pytest.raises(ConfigError, match="pip install 'megajax\\[searchers\\]'"):
        from_evosax("CMA_ES", planted, GENOME, num_offspring=P)


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
    search = from_evosax(name, planted, GENOME, num_offspring=16)
    start = search.init(KEY, GENOME.init(KEY, 16))
    state, infos = run(KEY, search, start, 40)
    assert float(state.best.fitness) > float(start.best.fitness)
    assert int(state.evaluations) == 16 * 41
    assert not infos.invalid.any()
