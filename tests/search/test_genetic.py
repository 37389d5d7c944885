"""The loop: determinism, resuming, elitism, what is traced and what crosses to the host."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from searches import assert_it_goes_on_bit_identical

from megajax.errors import SearchError
from megajax.search import operators
from megajax.search.genetic import (
    _split,
    describe,
    genetic_algorithm,
    init_many,
    rescored,
    run,
    run_many,
)

KEY = jax.random.key(3)
TARGET = jnp.linspace(-0.5, 1.5, 12)


def sphere(genes):
    return -jnp.sum((genes - TARGET) ** 2, axis=-1), ()


def make(evaluate=sphere, num_offspring=30, **operators_):
    return genetic_algorithm(evaluate, num_offspring=num_offspring, **operators_)


def first_genes(num=32):
    return jax.random.normal(jax.random.key(1), (num, 12))


def test_it_climbs_to_a_known_optimum():
    ga = make(num_offspring=64, mutate=partial(operators.gaussian, rate=0.2, scale=0.1))
    state, _ = run(KEY, ga, ga.init(KEY, first_genes(64)), 300)
    np.testing.assert_allclose(state.best.genes, TARGET, atol=0.1)


@pytest.mark.parametrize("survive", [operators.plus, operators.generational])
def test_scan_is_the_loop_of_steps(survive):
    ga = make(survive=survive)
    start = ga.init(KEY, first_genes())
    scanned, infos = run(KEY, ga, start, 7, generations_per_chunk=3)
    state, looped = start, []
    for g in range(7):
        state, info = jax.jit(ga.step)(jax.random.fold_in(KEY, g), state)
        looped.append(info)
    chex.assert_trees_all_close(scanned, state, rtol=1e-5)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *looped)
    chex.assert_trees_all_close(infos, expected, rtol=1e-5)
    assert infos.generation.tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_continued_from_any_generation_it_ends_bit_identical(stop):
    ga = make()
    assert_it_goes_on_bit_identical(KEY, ga, ga.init(KEY, first_genes()), stop)


def test_another_key_is_another_search():
    ga = make()
    start = ga.init(KEY, first_genes())
    ends = [run(jax.random.key(seed), ga, start, 3)[0].population.genes for seed in (0, 1, 0)]
    assert not np.array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


@pytest.mark.parametrize("survive", [operators.plus, operators.generational])
def test_best_never_falls_and_survivors_are_not_evaluated_again(survive):
    # An evaluation that depends on the generation's noise would change the score of a survivor.
    def noisy(genes):
        return sphere(genes)[0] + 5 * jnp.sin(1e4 * genes.sum(-1)), ()

    ga = make(noisy, num_offspring=30, survive=survive)
    state, infos = run(KEY, ga, ga.init(KEY, first_genes(32)), 40)
    assert (np.diff(infos.best_ever) >= 0).all()
    assert (np.diff(infos.best) >= 0).all()  # two elites, or the best of all
    assert infos.evaluations.tolist() == [32 + 30 * (g + 1) for g in range(40)]
    assert float(state.best.fitness) == infos.best_ever[-1] == state.population.fitness.max()


def test_without_elites_the_best_ever_is_still_kept():
    ga = make(num_offspring=32, survive=operators.generational)
    state, infos = run(KEY, ga, ga.init(KEY, first_genes(32)), 60)
    assert (np.diff(infos.best_ever) >= 0).all()
    assert (np.diff(infos.best) < 0).any()
    np.testing.assert_allclose(sphere(state.best.genes)[0], infos.best_ever[-1], rtol=1e-6)


def test_fitness_that_is_no_finite_number_never_wins_and_is_counted():
    def broken(genes):
        fitness, aux = sphere(genes)
        bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf])[jnp.arange(len(genes)) % 3]
        return jnp.where(jnp.arange(len(genes)) % 2 == 0, bad, fitness), aux

    ga = make(broken)
    state, infos = run(KEY, ga, ga.init(KEY, first_genes()), 5)
    assert (infos.invalid == 15).all()
    assert np.isfinite(infos.best).all()
    assert np.isfinite(infos.median).all()
    np.testing.assert_allclose(sphere(state.best.genes)[0], state.best.fitness, rtol=1e-6)


def test_all_invalid_population_reports_no_number():
    ga = make(lambda genes: (jnp.full(len(genes), jnp.nan), ()))
    info = describe(ga.init(KEY, first_genes()))
    assert np.isnan([info.best, info.mean, info.worst]).all()
    assert np.isneginf(info.best_ever)
    assert info.invalid == 32


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_generation_without_finite_fitness_ends_the_run_after_the_callback_saw_it(chunk):
    """The population wanders off, and has no fitness beyond 1,000: in generation 3."""

    def fragile(genes):
        fitness, aux = sphere(genes)
        return jnp.where(jnp.abs(genes).max(axis=-1) < 1e3, fitness, jnp.nan), aux

    wander, seen = lambda key, genes: genes + 400, []
    ga = make(fragile, num_offspring=32, mutate=wander, survive=operators.generational)
    with pytest.raises(SearchError, match="generation 3: none of the 32 networks has a finite"):
        run(
            KEY,
            ga,
            ga.init(KEY, first_genes()),
            9,
            generations_per_chunk=chunk,
            callback=lambda state, infos: seen.append((state, infos)),
        )
    state, infos = seen[-1]
    assert state.generation == (3 if chunk == 1 else 4)
    assert infos.invalid[infos.generation == 3] == 32
    assert np.isfinite(state.best.fitness)


def test_infos_are_the_populations_statistics():
    ga = make()
    state = ga.init(KEY, first_genes())
    state, info = ga.step(KEY, state)
    fitness = np.asarray(state.population.fitness, np.float64)
    np.testing.assert_allclose(info.mean, fitness.mean(), rtol=1e-5)
    np.testing.assert_allclose(info.median, np.median(fitness), rtol=1e-5)
    np.testing.assert_allclose(info.std, fitness.std(), rtol=1e-5)
    np.testing.assert_allclose(info.worst, fitness.min(), rtol=1e-6)
    spread = np.asarray(state.population.genes, np.float64).std(axis=0).mean()
    np.testing.assert_allclose(info.diversity, spread, rtol=1e-5)


def test_diversity_weighs_leaves_by_their_genes():
    genes = {"a": first_genes()[:, :3], "b": first_genes()[:, 3:]}
    ga = make(lambda g: (g["a"].sum(-1), ()))
    spread = np.asarray(first_genes(), np.float64).std(axis=0).mean()
    np.testing.assert_allclose(describe(ga.init(KEY, genes)).diversity, spread, rtol=1e-5)


def test_aux_travels_with_its_individual():
    ga = make(lambda genes: (sphere(genes)[0], {"sum": genes.sum(-1)}))
    state, _ = run(KEY, ga, ga.init(KEY, first_genes()), 5)
    np.testing.assert_allclose(
        state.population.aux["sum"], state.population.genes.sum(-1), rtol=1e-5
    )


def test_a_users_own_operators_drop_in():
    def greedy(key, fitness, num):
        del key
        return jnp.full(num, jnp.argmax(fitness))

    def swap(key, first, second):
        del key, first
        return second

    ga = make(select=greedy, cross=swap, mutate=lambda key, genes: genes + 1)
    state = ga.init(KEY, first_genes())
    best = state.best.genes
    state, _ = ga.step(KEY, state)
    survivors = np.asarray(state.population.genes)
    matches = (np.abs(survivors - (best + 1)) < 1e-6).all(-1) | np.isin(
        survivors[:, 0], np.asarray(first_genes()[:, 0])
    )
    assert matches.all()


# Limits ---------------------------------------------------------------------------------------


def test_evaluation_budget_is_never_exceeded():
    ga = make(num_offspring=30)
    for budget, generations in ((31, 0), (62, 1), (121, 2), (10_000, 6)):
        state, infos = run(KEY, ga, ga.init(KEY, first_genes(32)), 6, evaluation_budget=budget)
        assert len(infos.generation) == int(state.generation) == generations
        assert int(state.evaluations) <= max(budget, 32)


def test_patience_counts_generations_without_progress_across_chunks_and_calls():
    ga = make(lambda genes: (jnp.zeros(len(genes)), ()))
    start = ga.init(KEY, first_genes())
    state, _ = run(KEY, ga, start, 50, patience=6, generations_per_chunk=2)
    assert int(state.generation) == 6
    state, _ = run(KEY, ga, start, 4, patience=6, generations_per_chunk=2)
    state, _ = run(KEY, ga, state, 50, patience=6, generations_per_chunk=2)
    assert int(state.generation) == 6


def test_time_budget_and_callback_stop_between_chunks():
    ga = make()
    start = ga.init(KEY, first_genes())
    assert int(run(KEY, ga, start, 10, time_budget=0.0)[0].generation) == 0
    seen = []

    def callback(state, infos):
        seen.append(infos.generation.tolist())
        return len(seen) == 2

    state, infos = run(KEY, ga, start, 10, generations_per_chunk=3, callback=callback)
    assert seen == [[1, 2, 3], [4, 5, 6]]
    assert int(state.generation) == len(infos.generation) == 6


# Several searches -----------------------------------------------------------------------------


@pytest.mark.slow
def test_searches_in_one_program_are_the_searches_alone():
    def evaluate(target, genes):
        # On a plateau near the target nothing improves, so that patience has something to end.
        return jnp.minimum(-jnp.sum((genes - target) ** 2, axis=-1), -15.0), ()

    targets = [TARGET, 0 * TARGET, TARGET + 0.5]
    first = make(Partial(evaluate, targets[0]))
    searches = [first, *(rescored(first, Partial(evaluate, target)) for target in targets[1:])]
    keys = list(jax.random.split(KEY, 3))
    limits = {"generations_per_chunk": 3, "patience": 4}

    starts = init_many(keys, searches, [first_genes()] * 3)
    states, infos = run_many(keys, searches, starts, [40, 5, 0], **limits)
    alone = [
        run(key, search, search.init(key, first_genes()), generations, **limits)
        for key, search, generations in zip(keys, searches, [40, 5, 0], strict=True)
    ]
    chex.assert_trees_all_equal(list(zip(states, infos, strict=True)), alone)
    lengths = [len(info.generation) for info in infos]
    assert lengths[0] % 3 == 0  # patience ends a search after a whole chunk
    assert 5 < lengths[0] < 40
    assert lengths[1:] == [5, 0]

    skipped = init_many(keys, searches, [first_genes()] * 3, skip=[False, True, False])
    chex.assert_trees_all_equal(skipped[::2], starts[::2])
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(skipped[1]))


def test_what_searches_have_in_common_is_passed_once():
    images, targets = jnp.zeros(1000), [jnp.zeros(3), jnp.ones(3)]
    evaluations = [Partial(max, target, images) for target in targets]
    common, own = _split(evaluations)
    assert common.args[1] is images
    assert [one.args for one in own] == [(targets[0], None), (targets[1], None)]


# Speed contracts ------------------------------------------------------------------------------


def test_a_thousand_generations_trace_once_and_never_touch_the_host_inside_a_chunk():
    traces = []

    def evaluate(target, genes):
        traces.append(genes.shape)
        return -jnp.sum((genes - target) ** 2, axis=-1), ()

    ga = make(Partial(evaluate, jax.device_put(TARGET)), num_offspring=256)
    start = ga.init(KEY, first_genes(256))
    traces.clear()
    chunks = []
    with jax.transfer_guard("disallow"):  # the host's own looks between chunks are explicit
        state, infos = run(
            KEY, ga, start, 1000, generations_per_chunk=100, callback=lambda *_: chunks.append(1)
        )
    assert int(state.generation) == 1000
    assert len(chunks) == 10
    assert len(infos.best) == 1000
    assert len(set(traces)) == 1
    first_call = len(traces)
    run(KEY, ga, start, 55, generations_per_chunk=100)  # an odd number, another chunk length
    assert len(traces) == first_call


def test_step_is_traced_at_most_once_over_ten_generations():
    chex.clear_trace_counter()
    ga = make()
    step = jax.jit(chex.assert_max_traces(n=1)(lambda key, state: ga.step(key, state)))
    state = ga.init(KEY, first_genes())
    for g in range(10):
        state, _ = step(jax.random.fold_in(KEY, g), state)
    assert int(state.generation) == 10
