"""The genetic algorithm and the loop: determinism, resuming, elitism, what is traced."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searches import assert_it_goes_on_bit_identical, shifted, started

from megajax.errors import ConfigError, SearchError
from megajax.merging.masks import masks
from megajax.search import operators
from megajax.search.genetic import GeneticAlgorithm, check_operators
from megajax.search.loop import (
    Limits,
    _generations,
    check_alive,
    describe,
    examples_scored,
    first_info,
    run,
)
from megajax.search.methods import EvolutionConfig, limits_of, make_search
from megajax.types import Method, bind

KEY = jax.random.key(3)
TARGET = jnp.linspace(-0.5, 1.5, 12)


def make(evaluate=shifted, num_offspring=30, **choices):
    return GeneticAlgorithm(evaluate, num_offspring, **choices)


def first_genes(num=32):
    return jax.random.normal(jax.random.key(1), (num, 12))


def start_of(search, genes=None, problem=TARGET):
    return started(search, first_genes() if genes is None else genes, problem)


def test_it_climbs_to_a_known_optimum():
    ga = make(num_offspring=64, mutate=bind(operators.gaussian, rate=0.2, scale=0.1))
    state, _ = run(KEY, ga, start_of(ga, first_genes(64)), TARGET, Limits(300, per_call=50))
    np.testing.assert_allclose(state.best.genes, TARGET, atol=0.1)


@pytest.mark.parametrize("survive", [operators.plus, operators.generational])
def test_a_compiled_call_is_the_loop_of_steps(survive):
    ga = make(survive=survive)
    start = start_of(ga)
    done, infos = run(KEY, ga, start, TARGET, Limits(7, per_call=3))
    state, noted = start, []
    step = jax.jit(ga.step)
    for g in range(7):
        state, record = step(jax.random.fold_in(KEY, g), state, TARGET)
        noted.append(record)
    chex.assert_trees_all_close(done, state, rtol=1e-5)
    expected = describe(jax.tree.map(lambda *leaves: np.stack(leaves), *noted))
    chex.assert_trees_all_close(infos, expected, rtol=1e-5)
    assert infos.generation.tolist() == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_continued_from_any_generation_it_ends_bit_identical(stop):
    ga = make()
    assert_it_goes_on_bit_identical(KEY, ga, start_of(ga), TARGET, stop)


def test_another_key_is_another_search():
    ga = make()
    start = start_of(ga)
    keys = [jax.random.key(seed) for seed in (0, 1, 0)]
    ends = [run(key, ga, start, TARGET, Limits(3))[0].population.genes for key in keys]
    assert not np.array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


@pytest.mark.parametrize("survive", [operators.plus, operators.generational])
def test_best_never_falls_and_survivors_are_not_evaluated_again(survive):
    # A rugged landscape: a survivor that were evaluated with other bits would change its score.
    def rugged(target, genes):
        return shifted(target, genes) + 5 * jnp.sin(1e4 * genes.sum(-1))

    ga = make(rugged, survive=survive)
    state, infos = run(KEY, ga, start_of(ga), TARGET, Limits(40))
    assert (np.diff(infos.best_ever) >= 0).all()
    assert (np.diff(infos.best) >= 0).all()  # two elites, or the best of all
    assert infos.evaluations.tolist() == [32 + 30 * (g + 1) for g in range(40)]
    assert infos.completed.tolist() == infos.evaluations.tolist()
    assert not infos.partial.any()
    assert float(state.best.fitness) == infos.best_ever[-1] == state.population.fitness.max()


def test_without_elites_the_best_ever_is_still_kept():
    ga = make(num_offspring=32, survive=operators.generational)
    state, infos = run(KEY, ga, start_of(ga), TARGET, Limits(60))
    assert (np.diff(infos.best_ever) >= 0).all()
    assert (np.diff(infos.best) < 0).any()
    np.testing.assert_allclose(shifted(TARGET, state.best.genes), infos.best_ever[-1], rtol=1e-6)


def broken(target, genes):
    """Every other individual has no finite fitness."""
    bad = jnp.array([jnp.nan, jnp.inf, -jnp.inf])[jnp.arange(len(genes)) % 3]
    return jnp.where(jnp.arange(len(genes)) % 2 == 0, bad, shifted(target, genes))


def test_fitness_that_is_no_finite_number_never_wins_and_is_counted():
    ga = make(broken)
    state, infos = run(KEY, ga, start_of(ga), TARGET, Limits(5))
    assert (infos.invalid == 15).all()
    assert (infos.valid == 15).all()
    for figure in (infos.best, infos.median, infos.mean, infos.std, infos.worst):
        assert np.isfinite(figure).all()
    np.testing.assert_allclose(shifted(TARGET, state.best.genes), state.best.fitness, rtol=1e-6)


def test_all_invalid_population_has_no_number_and_is_an_error():
    ga = make(lambda target, genes: jnp.full(len(genes), jnp.nan))
    info = first_info(start_of(ga))
    assert np.isneginf([info.best, info.median, info.mean, info.worst, info.best_ever]).all()
    assert (info.invalid, info.valid) == (32, 0)
    with pytest.raises(SearchError, match="generation 0: none of the 32 networks has a finite"):
        check_alive(info)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_generation_without_finite_fitness_ends_the_run_after_the_callback_saw_it(chunk):
    """The population wanders off, and has no fitness beyond 1,000: in generation 3."""

    def fragile(target, genes):
        near = jnp.abs(genes).max(axis=-1) < 1e3
        return jnp.where(near, shifted(target, genes), jnp.nan)

    wander, seen = lambda key, genes: genes + 400, []
    ga = make(fragile, num_offspring=32, mutate=wander, survive=operators.generational)
    with pytest.raises(SearchError, match="generation 3: none of the 32 networks has a finite"):
        run(
            KEY,
            ga,
            start_of(ga),
            TARGET,
            Limits(9, per_call=chunk),
            callback=lambda state, infos: seen.append((state, infos)),
        )
    state, infos = seen[-1]
    assert state.generation == (3 if chunk == 1 else 4)
    assert infos.invalid[infos.generation == 3] == 32
    assert np.isfinite(state.best.fitness)


def test_infos_are_the_populations_statistics():
    ga = make()
    state, infos = run(KEY, ga, start_of(ga), TARGET, Limits(1))
    for at, of in ((first_info(start_of(ga)), start_of(ga)), (infos, state)):
        fitness = np.asarray(of.population.fitness, np.float64)
        np.testing.assert_allclose(at.best, [fitness.max()], rtol=1e-6)
        np.testing.assert_allclose(at.mean, [fitness.mean()], rtol=1e-5)
        np.testing.assert_allclose(at.median, [np.median(fitness)], rtol=1e-5)
        np.testing.assert_allclose(at.std, [fitness.std()], rtol=1e-5)
        np.testing.assert_allclose(at.worst, [fitness.min()], rtol=1e-6)
        spread = np.asarray(of.population.genes, np.float64).std(axis=0).mean()
        np.testing.assert_allclose(at.diversity, [spread], rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 7, 32])
def test_diversity_weighs_leaves_by_their_genes_and_keeps_its_digits(size):
    genes = first_genes(size) + 1000.0  # far from zero, where moments lose their digits
    tree = {"a": genes[:, :3], "b": genes[:, 3:].reshape(size, 3, 3)}
    ga = make(lambda target, genes: genes["a"].sum(-1))
    spread = np.asarray(genes, np.float64).std(axis=0).mean()
    np.testing.assert_allclose(first_info(start_of(ga, tree)).diversity, [spread], rtol=1e-4)


def test_aux_travels_with_its_individual():
    ga = make(lambda target, genes: (shifted(target, genes), {"sum": genes.sum(-1)}))
    state, _ = run(KEY, ga, start_of(ga), TARGET, Limits(5))
    sums = state.population.genes.sum(-1)
    np.testing.assert_allclose(state.population.aux["sum"], sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.best.aux["sum"], state.best.genes.sum(), rtol=1e-5, atol=1e-5)


def test_a_users_own_operators_drop_in():
    def greedy(key, fitness, num):
        del key
        return jnp.full(num, jnp.argmax(fitness))

    def swap(key, first, second):
        del key, first
        return second

    ga = make(select=greedy, cross=swap, mutate=lambda key, genes: genes + 1)
    check_operators(ga, first_genes())
    start = start_of(ga)
    state, _ = run(KEY, ga, start, TARGET, Limits(1))
    survivors = np.asarray(state.population.genes)
    matches = (np.abs(survivors - (start.best.genes + 1)) < 1e-6).all(-1) | np.isin(
        survivors[:, 0], np.asarray(first_genes()[:, 0])
    )
    assert matches.all()


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"select": lambda key, fitness, num: jnp.argsort(fitness)[: num // 2]},
            r"^evolution.selection gives int32\[30\]: int32\[60\] is needed$",
        ),
        (
            {"select": lambda key, fitness, num: fitness[jnp.arange(num) % 32]},
            r"^evolution.selection gives float32\[60\]: int32\[60\] is needed$",
        ),
        (
            {"cross": lambda key, first, second: first[:-1]},
            r"^evolution.crossover gives float32\[29, 12\]: float32\[30, 12\] is needed$",
        ),
        (
            {"mutate": lambda key, genes: {"genes": genes}},
            r"^evolution.mutation gives {'genes': 'float32\[30, 12\]'}: float32\[30, 12\] is",
        ),
        (
            {"mutate": lambda genes: genes},
            r"^evolution.mutation failed: .*takes 1 positional argument but 2 were given$",
        ),
        (
            {"survive": lambda key, population, offspring: offspring},
            r"^evolution.survival gives Population\(genes='float32\[30, 12\]', .*\[32, 12\].* is",
        ),
    ],
)
def test_operators_that_return_something_else_are_refused_by_name(choices, message):
    with pytest.raises(ConfigError, match=message) as error:
        check_operators(make(**choices), first_genes())
    assert "\n" not in str(error.value)


# Limits ---------------------------------------------------------------------------------------


def test_a_budget_of_examples_is_never_exceeded():
    ga = make(num_offspring=30)
    for networks, generations in ((31, 0), (61, 0), (62, 1), (121, 2), (10_000, 6)):
        limits = Limits(6, examples=networks * 500)
        state, infos = run(KEY, ga, start_of(ga), TARGET, limits, num_examples=500)
        assert len(infos.generation) == int(state.generation) == generations
        spent = examples_scored(ga, 500, state.counts)
        assert spent == 500 * (32 + 30 * generations) <= max(networks, 32) * 500


def test_patience_counts_generations_without_progress_across_chunks_and_calls():
    ga = make(lambda target, genes: jnp.zeros(len(genes)))
    start, limits = start_of(ga), Limits(50, patience=6, per_call=2)
    state, _ = run(KEY, ga, start, TARGET, limits)
    assert int(state.generation) == int(state.stale) == 6
    state, _ = run(KEY, ga, start, TARGET, limits._replace(generations=4))
    state, infos = run(KEY, ga, state, TARGET, limits)
    assert int(state.generation) == 6
    assert infos.generation.tolist() == [5, 6]
    state, infos = run(KEY, ga, state, TARGET, limits)
    assert int(state.generation) == 6
    assert infos.generation.size == infos.best.size == 0


def test_time_budget_and_callback_stop_between_chunks():
    ga = make()
    start = start_of(ga)
    assert int(run(KEY, ga, start, TARGET, Limits(10, seconds=0.0))[0].generation) == 0
    seen = []

    def callback(state, infos):
        seen.append(infos.generation.tolist())
        return len(seen) == 2

    state, infos = run(KEY, ga, start, TARGET, Limits(10, per_call=3), callback=callback)
    assert seen == [[1, 2, 3], [4, 5, 6]]
    assert int(state.generation) == len(infos.generation) == 6


# From a configuration -------------------------------------------------------------------------


def space(**options):
    return masks({"w": np.zeros((2, 5), np.float32)}, 2, granularity="element", **options)


def configured(space=None, **choices):
    config = EvolutionConfig(**{"population_size": 8, **choices})
    return make_search(config, space_of(space), shifted, None)


def space_of(given):
    return space() if given is None else given


def test_equal_choices_make_equal_searches():
    choices = [
        {},
        {"crossover": ("uniform", "arithmetic_per_gene", "blx_alpha")},
        {"mutation": ("gaussian", "reset"), "mutation_rate": 0.3},
        {"selection": "rank", "survival": "generational", "elites": 2},
        {"method": "random"},
        {"method": "cma_es"},
        {"space": space(binary=True)},
    ]
    made = [[configured(**choice) for choice in choices] for _ in range(2)]
    assert made[0] == made[1]
    assert [hash(one) for one in made[0]] == [hash(one) for one in made[1]]
    assert len(set(made[0])) == len(choices)
    assert EvolutionConfig(crossover=["uniform"]) == EvolutionConfig(crossover=("uniform",))


def test_what_is_bound_is_a_value():
    assert bind(operators.gaussian, rate=0.1, scale=1.0) == bind(
        operators.gaussian, scale=1.0, rate=0.1
    )
    assert bind(operators.gaussian, rate=0.1) != bind(operators.gaussian, rate=0.2)
    assert bind(operators.gaussian, rate=0.1) != bind(operators.reset, rate=0.1)
    one, other = Method(space(), "repair"), Method(space(), "repair")
    assert one == other
    assert hash(one) == hash(other)
    assert one != Method(space(), "sample")
    assert one != Method(space(low=-0.1), "repair")
    points = jax.random.normal(KEY, (3, 10, 2))
    np.testing.assert_array_equal(one(points), space().repair(points))
    kept = bind(sorted, reverse=True, key=abs)
    assert kept([1, -3, 2]) == [-3, 2, 1]


def test_names_are_the_operators_with_the_configured_options():
    ga = configured(
        selection="tournament",
        tournament_size=5,
        crossover="two_point",
        mutation="reset",
        mutation_rate=0.25,
        survival="generational",
        elites=3,
    )
    assert ga.select == bind(operators.tournament, size=5)
    assert ga.cross == bind(operators.two_point, gene_ndim=1)
    assert ga.mutate == bind(
        operators.reset, rate=0.25, sample=Method(space(), "sample"), gene_ndim=1
    )
    assert ga.survive is operators.generational
    assert ga.repair == Method(space(), "repair")
    assert ga.num_offspring == 5
    per_gene = configured(crossover="arithmetic_per_gene").cross
    assert per_gene == bind(operators.arithmetic, per_gene=True, gene_ndim=1)
    assert configured(elites=3).num_offspring == 8  # `plus` has no elites


def test_a_gene_mutates_once_in_a_hundred_but_once_a_child_at_least():
    few = masks({"w": np.zeros(1, np.float32)}, 2, granularity="element")
    many = masks({"w": np.zeros(1000, np.float32)}, 2, granularity="element")
    assert dict(configured(few).mutate.options)["rate"] == 1
    assert dict(configured().mutate.options)["rate"] == 0.1
    assert dict(configured(many).mutate.options)["rate"] == 0.01


def test_own_functions_are_taken_as_they_are():
    def own(key, *arguments):
        del key
        return arguments[0]

    ga = configured(selection=own, crossover=own, mutation=own, survival=own)
    assert (ga.select, ga.cross, ga.mutate, ga.survive) == (own, own, own, own)


def test_binary_genes_are_never_blended():
    binary = space(binary=True)
    ga = configured(binary)
    assert ga.cross == bind(operators.uniform, gene_ndim=1)
    assert ga.mutate.function is operators.reset
    blended = bind(
        operators.choose_one,
        among=(
            bind(operators.uniform, gene_ndim=1),
            bind(operators.arithmetic, gene_ndim=1),
        ),
    )
    assert configured().cross == blended
    for crossover in ("arithmetic", "arithmetic_per_gene", "blx_alpha", ("uniform", "blx_alpha")):
        with pytest.raises(ConfigError, match=r"evolution.crossover is .* cannot be blended by"):
            configured(binary, crossover=crossover)
    configured(binary, crossover=("uniform", "one_point", "two_point"))


@pytest.mark.parametrize(
    "method", ["genetic", "random", "cma_es", "sep_cma_es", "differential_evolution"]
)
def test_methods_are_searches_that_cost_what_their_children_do(method):
    search = configured(method=method)
    assert search.cost(100) == 800
    assert search.partial_examples == 0
    hash(search)


def test_limits_are_those_of_the_section():
    config = EvolutionConfig(
        generations=7, patience=3, time_budget=2.5, evaluation_budget=90, generations_per_chunk=4
    )
    assert limits_of(config, 500) == Limits(7, 3, 2.5, 45_000, 4)
    assert limits_of(EvolutionConfig(), 500) == Limits(60, None, None, None, 1)


# Speed contracts ------------------------------------------------------------------------------


def test_a_thousand_generations_trace_once_and_never_touch_the_host_inside_a_chunk():
    traces = []

    def evaluate(target, genes):
        traces.append(genes.shape)
        return shifted(target, genes)

    ga = make(evaluate, num_offspring=256)
    start, target = start_of(ga, first_genes(256)), jax.device_put(TARGET)
    traces.clear()
    chunks = []
    # The host's own looks between chunks are explicit, but for the number of the last generation.
    with jax.transfer_guard_device_to_host("disallow"):
        state, infos = run(
            KEY,
            ga,
            start,
            target,
            Limits(1000, per_call=100),
            callback=lambda *_: chunks.append(1),
        )
    assert int(state.generation) == 1000
    assert len(chunks) == 10
    assert len(infos.best) == 1000
    assert len(set(traces)) == 1
    first_call = len(traces)
    run(KEY, ga, start, target, Limits(55, per_call=100))  # an odd number, another end
    run(jax.random.key(9), ga, start, 0 * target, Limits(7, per_call=100))  # another problem
    assert len(traces) == first_call


def test_step_is_traced_at_most_once_over_ten_generations():
    chex.clear_trace_counter()
    ga = make()
    step = jax.jit(chex.assert_max_traces(n=1)(lambda key, state: ga.step(key, state, TARGET)))
    state = start_of(ga)
    for g in range(10):
        state, _ = step(jax.random.fold_in(KEY, g), state)
    assert int(state.generation) == 10


def test_searches_with_equal_choices_share_one_program():
    def made():
        mutate = bind(operators.gaussian, rate=0.3)
        return make(num_offspring=17, mutate=mutate, cross=bind(operators.uniform, rate=0.2))

    for seed in range(3):
        search = made()
        start = start_of(search, problem=TARGET + seed)
        run(jax.random.key(seed), search, start, TARGET + seed, Limits(2 + seed, per_call=5))
        if seed == 0:
            programs = _generations._cache_size()
    assert _generations._cache_size() == programs


def test_partial_of_a_function_and_a_problem_of_any_structure():
    problem = {"target": TARGET, "weights": (jnp.ones(12), jnp.zeros(()))}

    def evaluate(problem, genes):
        weights, shift = problem["weights"]
        return -jnp.sum(weights * (genes - problem["target"]) ** 2, axis=-1) + shift

    ga = make(evaluate, mutate=partial(operators.gaussian, rate=0.1))
    state, _ = run(KEY, ga, start_of(ga, problem=problem), problem, Limits(3))
    plain = make(mutate=partial(operators.gaussian, rate=0.1))
    expected, _ = run(KEY, plain, start_of(plain), TARGET, Limits(3))
    np.testing.assert_allclose(state.population.fitness, expected.population.fitness, rtol=1e-5)
