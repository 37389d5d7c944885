"""Races, against NumPy that scores one network after the other."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from searches import assert_it_goes_on_bit_identical, started

import megajax as mj
from megajax.errors import ConfigError, SearchError
from megajax.merging.merge import search_of
from megajax.merging.problem import Problem, evaluate, race_of, sample
from megajax.search import operators
from megajax.search.genetic import GeneticAlgorithm, Race
from megajax.search.loop import Limits, examples_scored, run
from megajax.types import bind

KEY = jax.random.key(5)
N, P = 23, 8
RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(N, 6)).astype(np.float32), RNG.integers(0, 3, N)
PARENTS = [RNG.normal(size=(6, 3)).astype(np.float32) for _ in range(2)]


def apply_fn(kernel, inputs):
    return jnp.tanh(inputs @ kernel)


def problem_of(data=DATA, batch_size=10, **options):
    """Genes [P, 18, 2] mix two kernels element by element."""
    return mj.problem_for(
        apply_fn,
        PARENTS,
        data,
        genome=mj.GenomeConfig(granularity="element"),
        fitness=mj.FitnessConfig(batch_size=batch_size, population_chunk=1),
        **options,
    )


PROBLEM = problem_of()


def race(examples=7, share=0.25):
    return Race(bind(sample, count=examples), examples, share)


def make(how=None, num_offspring=P, **choices):
    defaults = {
        "cross": bind(operators.uniform, gene_ndim=1),
        "mutate": bind(operators.gaussian, rate=0.1, scale=0.3, gene_ndim=1),
        "repair": PROBLEM.genome.repair,
    }
    return GeneticAlgorithm(evaluate, num_offspring, race=how, **{**defaults, **choices})


def first_genes(num=P):
    return PROBLEM.genome.sample(jax.random.key(2), (num, 18, 2), jnp.float32)


def start_of(search, problem=PROBLEM):
    return started(search, first_genes(), problem)


def one_by_one(data, genes):
    """Negative cross-entropies in NumPy, `data` as a pair of arrays."""
    inputs, labels = (np.asarray(one) for one in data)
    found = []
    for shares in np.asarray(genes, np.float64).reshape(-1, 6, 3, 2):
        kernel = shares[..., 0] * PARENTS[0] + shares[..., 1] * PARENTS[1]
        logits = np.tanh(inputs @ kernel)
        total = np.log(np.exp(logits).sum(-1))
        found.append((logits[np.arange(len(labels)), labels] - total).mean())
    return np.array(found)


def examples_of(problem):
    (data,) = problem.batches
    there = np.asarray(data.valid)
    return np.asarray(data.inputs)[there], np.asarray(data.targets)[there]


def numbered(labels, batch_size=10) -> Problem:
    """A problem whose inputs are the examples' numbers."""
    inputs = np.arange(len(labels), dtype=np.float32)[:, None] * np.ones(6, np.float32)
    return problem_of((inputs, labels), batch_size)


# A sample -------------------------------------------------------------------------------------


def test_a_sample_is_drawn_without_replacement_and_anew():
    labels = np.arange(N) % 3
    problem = numbered(labels)
    draw = jax.jit(sample, static_argnames="count")
    chosen = []
    for seed in range(3):
        few = draw(jax.random.key(seed), problem, count=12)
        assert few.batches[0].valid.shape == (2, 6)
        inputs, targets = examples_of(few)
        np.testing.assert_array_equal(targets, inputs[:, 0].astype(int) % 3)
        assert len(set(inputs[:, 0].tolist())) == 12
        chosen.append(frozenset(inputs[:, 0].tolist()))
    assert len(set(chosen)) == 3
    few = draw(KEY, problem, count=7)
    assert (few.batches[0].valid.shape, few.num_examples) == ((1, 7), 7)
    everything, _ = examples_of(draw(KEY, problem, count=N))
    assert sorted(everything[:, 0].tolist()) == list(range(N))  # and no padding


def test_a_sample_has_of_every_label_its_share_and_all_examples_alike():
    labels = np.repeat([0, 1, 2, 2], [11, 6, 4, 2])  # in a random order
    labels = np.random.default_rng(0).permutation(labels)
    problem = numbered(labels, batch_size=16)
    keys = jax.random.split(KEY, 4000)
    few = jax.jit(jax.vmap(lambda key: sample(key, problem, count=13).batches[0].inputs))(keys)
    numbers = np.asarray(few)[..., 0].reshape(4000, -1)[:, :13].astype(int)
    counts = (labels[numbers][..., None] == np.arange(3)).sum(1)
    share = np.bincount(labels) * 13 / N
    assert (abs(counts - share) < 1).all()
    np.testing.assert_allclose(counts.mean(0), share, atol=5 * 0.5 / np.sqrt(4000))
    often = np.bincount(numbers.ravel(), minlength=N) / 4000
    chance = 13 / N
    np.testing.assert_allclose(often, chance, atol=5 * np.sqrt(chance * (1 - chance) / 4000))


def test_ignored_examples_and_padding_are_never_drawn_and_their_share_is_the_others():
    labels = np.where(np.arange(N) % 4 == 0, -100, np.arange(N) % 3)
    problem = numbered(labels, batch_size=6)
    there = np.flatnonzero(labels >= 0)
    assert problem.num_examples == len(there) == 17
    keys = jax.random.split(KEY, 500)
    few = jax.jit(jax.vmap(lambda key: sample(key, problem, count=5).batches[0]))(keys)
    numbers = np.asarray(few.inputs)[..., 0].reshape(500, -1)[:, :5].astype(int)
    assert set(numbers.ravel()) == set(there.tolist())
    assert np.asarray(few.valid).sum() == 500 * 5


@pytest.mark.parametrize(
    "targets",
    [
        RNG.normal(size=(N, 3)).astype(np.float32),  # no class labels
        {"y": np.arange(N) % 3},
        (np.arange(N) % 3, np.ones(N, np.float32)),  # labels and weights
    ],
    ids=["values", "dictionary", "weighted"],
)
def test_a_sample_takes_targets_of_any_form(targets):
    inputs = np.arange(N, dtype=np.float32)[:, None] * np.ones(6, np.float32)

    def metric(outputs, targets):
        return outputs[:, 0]

    problem = problem_of(mj.Task(inputs, targets, metric))
    (few,) = jax.jit(sample, static_argnames="count")(KEY, problem, count=9).batches
    numbers = np.asarray(few.inputs)[np.asarray(few.valid)][:, 0].astype(int)
    assert len(set(numbers.tolist())) == 9
    drawn = jax.tree.map(lambda leaf: np.asarray(leaf)[np.asarray(few.valid)], few.targets)
    chex.assert_trees_all_equal(drawn, jax.tree.map(lambda leaf: leaf[numbers], targets))


def test_candidates_are_recalibrated_on_no_more_examples_either():
    problem = replace(PROBLEM, calibration=jnp.ones((20, 6)))
    assert sample(KEY, problem, count=7).calibration.shape == (7, 6)
    assert sample(KEY, problem, count=22).calibration.shape == (20, 6)


# The race -------------------------------------------------------------------------------------


def test_finalists_are_numpys_and_their_fitness_is_the_full_one():
    ga = make(race(), survive=operators.generational)
    state, cost = start_of(ga), (P, P, 0)
    draw, step = jax.jit(sample, static_argnames="count"), jax.jit(ga.step)
    for g in range(6):
        key = jax.random.fold_in(KEY, g)
        after, noted = step(key, state, PROBLEM)
        few = draw(jax.random.split(key, 5)[4], PROBLEM, count=7)
        rough = one_by_one(examples_of(few), after.population.genes)
        finalists = np.argsort(-rough, kind="stable")[:2]
        expected = np.full(P, -np.inf)
        expected[finalists] = one_by_one(DATA, after.population.genes)[finalists]
        np.testing.assert_allclose(after.population.fitness, expected, rtol=1e-5)
        cost = (cost[0] + P, cost[1] + 2, cost[2] + P)
        assert tuple(map(int, noted.counts)) == cost
        assert (int(noted.invalid), int(noted.valid)) == (0, 2)
        state = after


def test_those_out_of_the_race_never_survive_a_scored_one():
    ga = make(race(), num_offspring=3 * P)
    state, infos = run(KEY, ga, start_of(ga), PROBLEM, Limits(8))
    assert np.isfinite(state.population.fitness).all()
    assert (np.diff(infos.best_ever) >= 0).all()
    np.testing.assert_allclose(
        state.population.fitness, one_by_one(DATA, state.population.genes), rtol=1e-5
    )


def test_all_examples_and_all_children_is_the_search_without_a_race():
    # Finalists are scored in the order of the race; one by one that changes no bit of a score.
    plain, raced = make(), make(race(N, 1.0))
    expected, before = run(KEY, plain, start_of(plain), PROBLEM, Limits(8))
    state, infos = run(KEY, raced, start_of(raced), PROBLEM, Limits(8))
    chex.assert_trees_all_equal(state.population, expected.population)
    chex.assert_trees_all_equal(state.best, expected.best)
    chex.assert_trees_all_equal(infos._replace(partial=0), before._replace(partial=0))
    assert infos.partial.tolist() == [P * (g + 1) for g in range(8)]


def fragile(problem, genes):
    """No number beyond 0.6; infinite on some examples, which a sample may miss, beyond 0.3."""
    hit = jnp.any(problem["valid"] & (problem["labels"] == 0))
    top = jnp.abs(genes).max(axis=-1)
    fitness = jnp.where(hit & (top > 0.3), jnp.inf, -top)
    return jnp.where(top > 0.6, jnp.nan, fitness), {"twice": 2 * top}


def first_few(key, problem, *, count):
    del key
    return jax.tree.map(lambda leaf: leaf[:count], problem)


def fragile_search(examples, share, **choices):
    how = Race(bind(first_few, count=examples), examples, share)
    defaults = {"mutate": bind(operators.gaussian, rate=0.0)}
    return GeneticAlgorithm(fragile, 8, race=how, **{**defaults, **choices})


@pytest.mark.parametrize(("labels", "scored", "lost"), [([1, 0, 0], 4, 3), ([0, 1, 1], 4, 1)])
def test_what_is_no_number_is_never_the_best_and_those_out_have_no_fitness(labels, scored, lost):
    """The sample of one example knows of label 0 in the second case only."""
    problem = {"valid": jnp.ones(3, bool), "labels": jnp.array(labels)}
    genes = jnp.array([[0.1], [0.9], [0.4], [0.7], [0.2], [0.5], [0.8], [0.25]])
    ga = fragile_search(1, 0.5, cross=lambda key, first, second: genes)
    ga = replace(ga, survive=operators.generational)
    after, noted = jax.jit(ga.step)(KEY, started(ga, genes, problem), problem)
    population = after.population
    # Best on the sample are 0.1, 0.2, 0.25 and, if it has no label 0, 0.4, which fails in full.
    assert np.isfinite(population.fitness).tolist() == [1, 0, 0, 0, 1, 0, 0, 1]
    assert float(after.best.fitness) == np.float32(-0.1)
    chosen = [0, 4, 7, 2] if labels[0] else [0, 4, 7]
    twice = np.asarray(population.aux["twice"])
    np.testing.assert_allclose(twice[chosen], 2 * np.asarray(genes)[chosen, 0], rtol=1e-6)
    assert (twice != 0).sum() == scored
    assert (int(noted.counts.full), int(noted.valid), int(noted.invalid)) == (8 + scored, 3, 1)


@pytest.mark.parametrize("genes", [0.45, 0.9])
def test_a_generation_in_which_no_one_has_a_fitness_ends_the_search(genes):
    problem = {"valid": jnp.ones(3, bool), "labels": jnp.array([1, 0, 0])}
    ga = fragile_search(1, 0.5, mutate=lambda key, g: 0 * g + genes)
    with pytest.raises(SearchError, match="generation 1: none of the 4 networks has a finite"):
        run(KEY, ga, started(ga, jnp.full((8, 1), 0.05), problem), problem, Limits(3))


def test_a_share_is_rounded_up_and_leaves_one_at_least():
    shares = {0.125: 4, 0.1: 4, 0.25: 8, 0.01: 1, 1e-9: 1, 1.0: 32, 0.09375: 3}
    assert {share: race(7, share).finalists(32) for share in shares} == shares


# The loop -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 9])
def test_continued_from_any_generation_it_ends_bit_identical(stop):
    ga = make(race())
    assert_it_goes_on_bit_identical(KEY, ga, start_of(ga), PROBLEM, stop)


def test_a_step_is_traced_once_and_never_touches_the_host():
    chex.clear_trace_counter()
    ga, problem = make(race()), jax.device_put(PROBLEM)
    step = jax.jit(chex.assert_max_traces(n=1)(lambda *arguments: ga.step(*arguments)))
    state = start_of(ga)
    keys = [jax.random.fold_in(KEY, g) for g in range(5)]
    step(keys[0], state, problem)
    with jax.transfer_guard("disallow"):
        for key in keys:
            state, _ = step(key, state, problem)
    assert int(state.generation) == 5


def test_the_default_search_has_the_bits_that_it_always_had():
    """Recorded before there was a choice; nothing in it is rounded, so it holds on any machine."""

    def distance(problem, genes):
        return -jnp.abs(genes - 0.625).max(axis=-1)

    def mutate(key, genes):
        hit, new = jax.random.split(key)
        drawn = jax.random.uniform(new, genes.shape)
        return jnp.where(jax.random.uniform(hit, genes.shape) < 0.25, drawn, genes)

    def select(key, fitness, num):  # the integers that `jax.random.randint` draws, as then
        size, drawn = len(fitness), []
        places = jax.random.randint(key, (num, 3), 0, np.array([size, size - 1, size - 2]))
        for index in places.T:
            for earlier in jnp.sort(jnp.stack(drawn), axis=0) if drawn else ():
                index = index + (index >= earlier)
            drawn.append(index)
        contestants = jnp.stack(drawn, axis=1)
        winners = jnp.argmax(fitness[contestants], axis=1)
        return jnp.take_along_axis(contestants, winners[:, None], axis=1)[:, 0]

    def cross(key, first, second):  # a number for each gene, from a key for each leaf, as then
        (key,) = jax.random.split(key, 1)
        return jnp.where(jax.random.bernoulli(key, np.float32(0.5), first.shape), second, first)

    ga = GeneticAlgorithm(distance, 12, select=select, cross=cross, mutate=mutate)
    genes = jax.random.uniform(jax.random.key(1), (16, 4))
    state, infos = run(jax.random.key(3), ga, started(ga, genes, None), None, Limits(6))
    assert [float(gene).hex() for gene in state.best.genes] == [
        "0x1.36efa80000000p-1",
        "0x1.6256940000000p-1",
        "0x1.5101480000000p-1",
        "0x1.0b0f100000000p-1",
    ]
    assert [float(best).hex() for best in infos.best_ever] == [
        "-0x1.718bc00000000p-3",
        "-0x1.718bc00000000p-3",
        "-0x1.22dce00000000p-3",
        "-0x1.1edc300000000p-3",
        "-0x1.1edc300000000p-3",
        "-0x1.a787800000000p-4",
    ]
    assert infos.evaluations.tolist() == infos.completed.tolist() == [28, 40, 52, 64, 76, 88]
    assert (infos.invalid + infos.valid == 12).all()


# What it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("per_call", [1, 4])
def test_a_budget_counts_passes_of_examples(per_call):
    ga = make(race(7, 0.25))
    each = P * 7 + 2 * N
    assert ga.cost(N) == each
    for budget in (P, P + 4, 3 * P, 40):
        limits = Limits(30, examples=budget * N, per_call=per_call)
        state, _ = run(KEY, ga, start_of(ga), PROBLEM, limits, num_examples=N)
        spent = examples_scored(ga, N, state.counts)
        assert spent == P * N + int(state.generation) * each
        assert spent <= budget * N < spent + each or int(state.generation) == 30


def test_counts_do_not_overflow():
    many = np.int32(2**31 - 1)
    counts = start_of(make()).counts._replace(full=many, partial=many)
    assert examples_scored(make(), 10**6, counts) == (2**31 - 1) * 10**6
    assert examples_scored(make(race()), N, counts) == (2**31 - 1) * (7 + N)


# Merges ---------------------------------------------------------------------------------------


def test_a_race_is_what_the_section_says_and_needs_the_examples_and_one_task():
    assert race_of(mj.FitnessConfig(), PROBLEM) is None
    config = mj.FitnessConfig(racing_examples=4, racing_finalists=0.2)
    found = race_of(config, PROBLEM)
    assert found == Race(bind(sample, count=4), 4, 0.2)
    assert found == race_of(config, problem_of())
    search = search_of(PROBLEM, mj.EvolutionConfig(population_size=P), config)
    assert search.cost(N) == P * 4 + 2 * N
    message = f"fitness.racing_examples is {N + 1}: there are only {N} validation examples"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        race_of(mj.FitnessConfig(racing_examples=N + 1), PROBLEM)
    two = problem_of([mj.Task(*DATA), mj.Task(*DATA)])
    with pytest.raises(ConfigError, match=r"racing_examples is 4: races are for one task"):
        race_of(config, two)
    with pytest.raises(ConfigError, match=r"evolution.method is 'random': only the genetic"):
        search_of(PROBLEM, mj.EvolutionConfig(method="random"), config)
    for name, value in (("racing_examples", 0), ("racing_finalists", 0), ("racing_finalists", 2.0)):
        with pytest.raises(ConfigError, match=f"fitness.{name} is {value}: it must"):
            mj.FitnessConfig(**{name: value})


def test_a_merge_says_what_a_race_cost():
    result = mj.merge(
        KEY,
        apply_fn,
        PARENTS,
        DATA,
        align=mj.AlignConfig(method="none"),
        genome=mj.GenomeConfig(granularity="element", binary=True),
        fitness=mj.FitnessConfig(population_chunk=1, racing_examples=4, racing_finalists=0.2),
        evolution=mj.EvolutionConfig(population_size=P, generations=5),
    )
    assert result.evaluations == P + 5 * P
    assert result.examples_scored == N * P + 5 * (P * 4 + 2 * N)
    assert result.history.completed.tolist() == [P + 2 * g for g in range(6)]
    assert result.history.partial.tolist() == [P * g for g in range(6)]
    assert result.fitness >= result.parent_fitness.max()
