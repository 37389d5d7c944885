"""Duplicates and races, against NumPy that scores one network after the other."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from searches import assert_it_goes_on_bit_identical

import megajax as mj
from megajax.errors import ConfigError, SearchError
from megajax.merging.fitness import batches, evaluator, negative_cross_entropy
from megajax.merging.tree import merge_tree
from megajax.search import operators
from megajax.search import racing as scoring
from megajax.search.genetic import genetic_algorithm, init_many, rescored, run, run_many
from megajax.search.racing import Racing, Scoring, examples_scored, on_sample, score_offspring

KEY = jax.random.key(5)
N, P = 23, 8


def random_data(seed=0):
    rng = np.random.default_rng(seed)
    images, labels = rng.normal(size=(N, 6)), rng.integers(0, 3, N)
    return batches(images.astype(np.float32), labels, 10)


def apply_fn(kernel, images):
    return jnp.tanh(images @ kernel)


PARENTS = jax.random.normal(jax.random.key(1), (2, 6, 3))


def of(data, chunk=1):
    """Genes [P, 18] are the shares of the second of two kernels, element by element."""

    def express(genes, parents):
        share = genes.reshape(6, 3)
        return (1 - share) * parents[0] + share * parents[1]

    return evaluator(
        express, apply_fn, negative_cross_entropy, PARENTS, data, population_chunk=chunk
    )


def racing(examples=7, share=0.25, chunk=1):
    few = batches(np.zeros((examples, 6), np.float32), np.zeros(examples, int), examples)
    sample = partial(on_sample, of(few, chunk).func, examples, N)
    return Racing(sample, examples, N, share)


def make(how=None, evaluate=None, num_offspring=P, **options):
    return genetic_algorithm(
        of(random_data()) if evaluate is None else evaluate,
        num_offspring=num_offspring,
        cross=partial(operators.uniform, gene_ndim=0),
        scoring=how,
        **{"mutate": partial(operators.gaussian, rate=0.02, scale=0.3)} | options,
    )


def first_genes(num=P):
    return jax.random.uniform(jax.random.key(2), (num, 18))


def start_of(ga):
    return ga.init(KEY, first_genes())


def one_by_one(evaluate, genes):
    alone = jax.jit(lambda evaluate, gene: evaluate(gene)[0])
    return np.array([alone(evaluate, genes[i : i + 1])[0] for i in range(len(genes))])


# Duplicates -----------------------------------------------------------------------------------


def numpy_twins(children, members, known):
    """Places as `twins` gives them, by comparing bytes."""

    def rows(genes):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(genes)]
        return [b"|".join(leaf[i].tobytes() for leaf in leaves) for i in range(len(leaves[0]))]

    seen, found = {}, []
    for place, row in enumerate(rows(members) + rows(children)):
        found.append(seen.get(row, place))
        if place >= len(known) or known[place]:
            seen.setdefault(row, place)
    return found[len(known) :]


def planted(dtype, seed=0):
    """Members and children of three leaves with few different values, and duplicates in both."""
    rng = np.random.default_rng(seed)

    def draw(num):
        return {
            "a": rng.integers(0, 2, (num, 2)).astype(dtype),
            "b": rng.integers(0, 2, (num, 1, 2)).astype(np.int32),
            "c": rng.integers(0, 2, (num,)) > 0,
        }

    return draw(40), draw(30)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.uint8, np.float16])
def test_duplicates_are_those_that_numpy_finds(dtype):
    children, members = planted(dtype)
    known = np.random.default_rng(1).random(30) < 0.7
    found = jax.jit(scoring.twins)(children, members, known).tolist()
    assert found == numpy_twins(children, members, known)
    assert len({place for place in found if place >= 30}) not in (0, 40)


def test_what_has_other_bits_is_no_duplicate():
    bits = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000, 0x0, 0x80000000, 0x1], np.uint32)
    genes = bits.view(np.float32)[:, None]
    known = np.ones(6, bool)
    assert scoring.twins(genes[:, :1], genes, known).tolist() == [0, 1, 2, 3, 4, 5]
    assert scoring.twins(genes, genes[:1], known[:1]).tolist() == [0, 2, 3, 4, 5, 6]


def test_leaves_and_places_are_told_apart():
    ones = jnp.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    for genes in (ones, {"a": ones[:, :1], "b": ones[:, 1:]}):
        assert len(np.unique(scoring.fingerprints(genes), axis=0)) == 4
        assert len(np.unique(scoring.fingerprints(genes)[:, 0])) == 4


@pytest.mark.parametrize("chunk", [1, 3, 8, None])
def test_only_those_wanted_are_scored_up_to_whole_chunks(chunk):
    genes = jnp.arange(8.0)
    for wanted in ([], [5], [0, 1, 6, 7], list(range(8))):
        calls = []

        def evaluate(genes, calls=calls):
            jax.debug.callback(lambda genes: calls.append(len(genes)), genes)
            return 10 * genes, {"next": genes[:, None] + 1}

        mask = np.isin(np.arange(8), wanted)
        fitness, aux, count = scoring.score_some(evaluate, genes, jnp.asarray(mask), chunk)
        jax.effects_barrier()
        np.testing.assert_array_equal(np.asarray(fitness)[mask], 10 * np.arange(8)[mask])
        np.testing.assert_array_equal(np.asarray(aux["next"])[mask, 0], 1 + np.arange(8)[mask])
        size = chunk or 8
        assert calls == [size] * -(-len(wanted) // size)
        assert int(count) == min(sum(calls), 8)


@pytest.mark.parametrize("survive", [operators.plus, operators.generational])
def test_reuse_changes_no_bit_of_the_search_and_counts_the_distinct(survive):
    plain, reused = (make(how, survive=survive) for how in (None, Scoring(reuse=True, chunk=1)))
    expected, before = run(KEY, plain, start_of(plain), 12)
    state, infos = run(KEY, reused, start_of(reused), 12)
    same = {"evaluations": 0, "completed": 0}
    chex.assert_trees_all_equal(state._replace(**same), expected._replace(**same))
    chex.assert_trees_all_equal(infos._replace(**same), before._replace(**same))
    assert int(state.evaluations) == int(state.completed) < int(expected.evaluations)
    if survive is operators.plus:
        return
    # As many children as members, none kept: the population is the last offspring.
    now, count = start_of(reused), P
    for g in range(12):
        after, info = jax.jit(reused.step)(jax.random.fold_in(KEY, g), now)
        found = numpy_twins(after.population.genes, now.population.genes, np.ones(P, bool))
        count += sum(place == P + i for i, place in enumerate(found))
        assert int(info.evaluations) == int(info.completed) == count
        now = after


def test_aux_and_failures_are_taken_over_too():
    def evaluate(genes):
        return jnp.where(genes > 6, jnp.nan, genes), {"twice": 2 * genes}

    members = scoring.evaluated(evaluate, jnp.array([7.0, 1.0]))
    children = jnp.array([8.0, 1.0, 7.0, 8.0, 3.0])
    for how, scored in (
        (Scoring(), 5),
        (Scoring(reuse=True, chunk=1), 2),
        (Scoring(reuse=True), 5),
    ):
        found = score_offspring(how, None, evaluate, children, members)
        assert found.offspring.fitness.tolist() == [-np.inf, 1, -np.inf, -np.inf, 3]
        assert found.offspring.aux["twice"].tolist() == [16, 2, 14, 16, 6]
        assert (int(found.invalid), int(found.evaluations)) == (3, scored)


@pytest.mark.parametrize("constant", ["all", "first"])
def test_a_collision_of_fingerprints_costs_a_scoring_and_nothing_else(monkeypatch, constant):
    real = scoring.fingerprints

    def poor(genes):
        hashes = real(genes)
        return 0 * hashes if constant == "all" else hashes % 2

    children, members = planted(np.float32)
    expected = numpy_twins(children, members, np.ones(30, bool))
    monkeypatch.setattr(scoring, "fingerprints", poor)
    found = scoring.twins(children, members, np.ones(30, bool)).tolist()
    more = [
        i for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)) if mine != theirs
    ]
    assert more
    assert all(found[i] == 30 + i for i in more)

    def evaluate(genes):
        return genes["a"].sum(-1) + 2 * genes["b"].sum((1, 2)) + 9 * genes["c"], ()

    parents = scoring.evaluated(evaluate, jax.tree.map(jnp.asarray, members))
    how = Scoring(reuse=True, chunk=1)
    scored = score_offspring(how, None, evaluate, jax.tree.map(jnp.asarray, children), parents)
    np.testing.assert_array_equal(scored.offspring.fitness, evaluate(children)[0])


# The race -------------------------------------------------------------------------------------


def test_a_sample_is_drawn_without_replacement_and_anew():
    data = batches(np.arange(N)[:, None], np.arange(N) % 3, 10)
    chosen = []
    for seed in range(3):
        few = scoring.draw(jax.random.key(seed), data, 12, N)
        assert few.valid.shape == (2, 6)
        images = few.images[few.valid][:, 0]
        np.testing.assert_array_equal(few.labels[few.valid], images % 3)
        assert len(set(images.tolist())) == 12
        chosen.append(frozenset(images.tolist()))
    assert len(set(chosen)) == 3
    few = scoring.draw(KEY, data, 7, N)
    assert (few.valid.shape, int(few.valid.sum())) == ((1, 7), 7)
    assert set(scoring.draw(KEY, data, N, N).images.reshape(-1).tolist()) == set(range(N))


def test_a_sample_has_of_every_label_its_share_and_all_examples_alike():
    labels = np.repeat([0, 1, 2, 3], [11, 6, 4, 2])  # in a random order
    labels = np.random.default_rng(0).permutation(labels)
    data = batches(np.arange(N)[:, None], labels, 16)
    keys = jax.random.split(KEY, 4000)
    few = jax.vmap(lambda key: scoring.draw(key, data, 13, N))(keys)
    images = np.asarray(few.images.reshape(4000, -1)[:, :13])
    counts = (np.asarray(labels)[images][..., None] == np.arange(4)).sum(1)
    share = np.bincount(labels) * 13 / N
    assert (abs(counts - share) < 1).all()
    np.testing.assert_allclose(counts.mean(0), share, atol=5 * 0.5 / np.sqrt(4000))
    often = np.bincount(images.ravel(), minlength=N) / 4000
    chance = 13 / N
    np.testing.assert_allclose(often, chance, atol=5 * np.sqrt(chance * (1 - chance) / 4000))


@pytest.mark.parametrize("reuse", [False, True])
def test_finalists_are_numpys_and_their_fitness_is_the_full_one(reuse):
    evaluate, race = of(random_data()), racing()
    ga = make(Scoring(reuse, 1, race), evaluate, survive=operators.generational)
    state, cost = start_of(ga), (P, P)
    for g in range(6):
        key = jax.random.fold_in(KEY, g)
        after, info = jax.jit(ga.step)(key, state)
        genes, fitness = after.population.genes, np.asarray(after.population.fitness)
        sample_key = jax.random.split(key, 5)[4]
        data = scoring.draw(sample_key, random_data(), 7, N)
        rough = one_by_one(of(data), genes)
        old = np.asarray(state.population.fitness)
        known = np.isfinite(old) if reuse else np.zeros(P, bool)
        origin = np.array(numpy_twins(genes, state.population.genes, known))
        if not reuse:
            origin = P + np.arange(P)
        fresh = origin == P + np.arange(P)
        finalists = [i for i in np.argsort(-rough, kind="stable") if fresh[i]][:2]
        expected = np.full(P, -np.inf, np.float32)
        expected[finalists] = one_by_one(evaluate, genes)[finalists]
        expected = np.concatenate([old, expected])[origin]
        np.testing.assert_array_equal(fitness, expected)
        cost = (cost[0] + fresh.sum(), cost[1] + len(finalists))
        assert (int(info.evaluations), int(info.completed)) == cost
        assert (int(info.invalid), int(info.valid)) == (0, np.isfinite(expected).sum())
        state = after


def test_those_out_of_the_race_never_survive_a_scored_one():
    ga = make(Scoring(racing=racing(), chunk=1), num_offspring=3 * P)
    state, infos = run(KEY, ga, start_of(ga), 8)
    assert np.isfinite(state.population.fitness).all()
    assert (np.diff(infos.best_ever) >= 0).all()
    np.testing.assert_array_equal(
        state.population.fitness, one_by_one(of(random_data()), state.population.genes)
    )


def test_all_examples_and_all_children_is_the_search_without_a_race():
    plain, raced = make(), make(Scoring(chunk=1, racing=racing(N, 1.0)))
    expected, before = run(KEY, plain, start_of(plain), 8)
    state, infos = run(KEY, raced, start_of(raced), 8)
    chex.assert_trees_all_equal(state, expected)
    chex.assert_trees_all_equal(infos, before)


def test_the_key_of_the_sample_leaves_the_others_as_they_are():
    four, five = (jax.random.key_data(jax.random.split(KEY, n)) for n in (4, 5))
    np.testing.assert_array_equal(four, five[:4])


def fragile(data, genes):
    """No number beyond 0.6; infinite on some examples, which a sample may miss, beyond 0.3."""
    hit = jnp.any(data.valid & (data.labels == 0))
    top = jnp.abs(genes).max(axis=-1)
    fitness = jnp.where(hit & (top > 0.3), jnp.inf, -top)
    return jnp.where(top > 0.6, jnp.nan, fitness), ()


def test_what_is_no_number_on_the_sample_is_invalid_and_not_tried_again():
    race = Racing(partial(on_sample, fragile, 4, N), 4, N, 0.5)
    evaluate = Partial(fragile, random_data())
    data = scoring.draw(KEY, random_data(), 4, N)
    hit = bool((np.asarray(data.labels)[np.asarray(data.valid)] == 0).any())
    genes = jnp.array([[0.1], [0.9], [0.4], [0.7], [0.2], [0.5], [0.8], [0.25]])
    parents = scoring.evaluated(evaluate, genes[:1])
    found = score_offspring(Scoring(chunk=1, racing=race), KEY, evaluate, genes, parents)
    # Best on the sample are 0.1, 0.2, 0.25 and, if it has no label 0, 0.4, which fails in full.
    assert np.isfinite(found.offspring.fitness).tolist() == [1, 0, 0, 0, 1, 0, 0, 1]
    assert (int(found.evaluations), int(found.completed)) == (8, 3 if hit else 4)
    assert int(found.invalid) == (5 if hit else 4)


@pytest.mark.parametrize("genes", [0.45, 0.9])
def test_a_generation_in_which_no_one_has_a_fitness_ends_the_search(genes):
    race = Racing(partial(on_sample, fragile, 1, N), 1, N, 0.5)
    evaluate = Partial(fragile, random_data())
    ga = make(Scoring(chunk=1, racing=race), evaluate, mutate=lambda key, g: 0 * g + genes)
    with pytest.raises(SearchError, match="generation 1: none of the 8 networks has a finite"):
        run(KEY, ga, ga.init(KEY, first_genes() / 10), 3)


# The loop -------------------------------------------------------------------------------------

BOTH = Scoring(reuse=True, chunk=1, racing=racing())


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_continued_from_any_generation_it_ends_bit_identical(stop):
    ga = make(BOTH)
    assert_it_goes_on_bit_identical(KEY, ga, start_of(ga), stop)


def test_a_step_is_traced_once_and_never_touches_the_host():
    chex.clear_trace_counter()
    ga = make(BOTH)
    step = jax.jit(chex.assert_max_traces(n=1)(lambda key, state: ga.step(key, state)))
    state = start_of(ga)
    keys = [jax.random.fold_in(KEY, g) for g in range(5)]
    step(keys[0], state)
    with jax.transfer_guard("disallow"):
        for key in keys:
            state, _ = step(key, state)
    assert int(state.generation) == 5


@pytest.mark.slow
@pytest.mark.parametrize("side_by_side", [False, True])
def test_searches_in_one_program_are_the_searches_alone(side_by_side):
    first = make(BOTH)
    searches = [first, rescored(first, Partial(first.step.args[0].func, -PARENTS, random_data()))]
    keys = list(jax.random.split(KEY))
    starts = init_many(keys, searches, [first_genes()] * 2, side_by_side=side_by_side)
    states, _ = run_many(keys, searches, starts, [6, 4], side_by_side=side_by_side)
    alone = [
        run(key, ga, ga.init(key, first_genes()), generations)[0]
        for key, ga, generations in zip(keys, searches, [6, 4], strict=True)
    ]
    check = partial(chex.assert_trees_all_close, rtol=1e-5)
    (check if side_by_side else chex.assert_trees_all_equal)(states, alone)


def test_the_default_search_has_the_bits_that_it_always_had():
    """Recorded before there was a choice; nothing in it is rounded, so it holds on any machine."""

    def evaluate(genes):
        return -jnp.abs(genes - 0.625).max(axis=-1), ()

    def mutate(key, genes):
        hit, new = jax.random.split(key)
        drawn = jax.random.uniform(new, genes.shape)
        return jnp.where(jax.random.uniform(hit, genes.shape) < 0.25, drawn, genes)

    cross = partial(operators.uniform, rate=np.float32(0.5))  # a number for each gene, as then
    ga = genetic_algorithm(evaluate, num_offspring=12, cross=cross, mutate=mutate)
    genes = jax.random.uniform(jax.random.key(1), (16, 4))
    state, infos = run(jax.random.key(3), ga, ga.init(jax.random.key(0), genes), 6)
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


@pytest.mark.parametrize("per_chunk", [1, 4, 50])
def test_a_budget_counts_passes_over_all_examples(per_chunk):
    race = racing(7, 0.25)
    ga = make(Scoring(chunk=1, racing=race))
    each = P * 7 + 2 * N
    for budget in (P, P + 4, 3 * P, 40):
        state, _ = run(
            KEY, ga, start_of(ga), 30, evaluation_budget=budget, generations_per_chunk=per_chunk
        )
        spent = examples_scored(race, N, P, state.evaluations, state.completed)
        assert spent == P * N + int(state.generation) * each
        assert spent <= budget * N < spent + each or int(state.generation) == 30


@pytest.mark.parametrize("per_chunk", [1, 4, 50])
def test_what_reuse_saves_is_spent(per_chunk):
    ga = make(Scoring(reuse=True, chunk=1))
    limits = {"evaluation_budget": 5 * P, "generations_per_chunk": per_chunk}
    state, _ = run(KEY, ga, start_of(ga), 30, **limits)
    assert 4 * P < int(state.evaluations) <= 5 * P
    assert int(state.generation) > 4
    whole, _ = run(KEY, ga, start_of(ga), int(state.generation))
    chex.assert_trees_all_equal(whole, state)


def test_counts_do_not_overflow():
    many = np.int32(2**31 - 1)
    assert examples_scored(None, 10**6, 1, many, many) == (2**31 - 1) * 10**6
    assert examples_scored(racing(), N, P, many, np.int32(P)) == (2**31 - 1 - P) * 7 + P * N


# Merges ---------------------------------------------------------------------------------------

SMALL = {"population_size": P, "generations": 5}


def merged(fitness=None, **evolution):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(N, 6)).astype(np.float32), rng.integers(0, 3, N)
    return mj.merge(
        KEY,
        apply_fn,
        list(PARENTS),
        data,
        genome=mj.GenomeConfig(granularity="element", binary=True),
        fitness=mj.FitnessConfig(population_chunk=1, **(fitness or {})),
        evolution=mj.EvolutionConfig(**(SMALL | evolution)),
    )


@pytest.mark.slow
def test_a_merge_says_what_it_cost():
    plain = merged()
    assert plain.examples_scored == N * plain.evaluations == N * 6 * P
    reused = merged(reuse_fitness=True)
    assert reused.fitness == plain.fitness
    np.testing.assert_array_equal(reused.variables, plain.variables)
    assert reused.examples_scored == N * reused.evaluations < plain.examples_scored
    raced = merged({"racing_examples": 4, "racing_finalists": 0.2})
    assert raced.evaluations == plain.evaluations
    assert raced.examples_scored == N * P + 5 * (P * 4 + 2 * N)
    assert raced.history.completed.tolist() == [P + 2 * g for g in range(6)]
    assert raced.fitness >= raced.parent_fitness.max()


def test_a_race_on_more_examples_than_there_are_is_refused():
    message = f"fitness.racing_examples is {N + 1}: there are only {N} validation examples"
    with pytest.raises(ConfigError, match=f"^{message}$"):
        merged({"racing_examples": N + 1})
    for name, value in (("racing_examples", 0), ("racing_finalists", 0), ("racing_finalists", 2.0)):
        with pytest.raises(ConfigError, match=f"fitness.{name} is {value}: it must be"):
            mj.FitnessConfig(**{name: value})


@pytest.mark.slow
def test_a_tree_shares_its_budget_by_cost():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(N, 6)).astype(np.float32), rng.integers(0, 3, N)
    tree = merge_tree(
        KEY,
        apply_fn,
        [PARENTS[0], PARENTS[1], PARENTS.sum(axis=0)],
        data,
        fitness=mj.FitnessConfig(population_chunk=1, racing_examples=4),
        evolution=mj.EvolutionConfig(population_size=P, evaluation_budget=30),
    )
    each = P * 4 + N
    assert tree.examples_scored == sum(result.examples_scored for result in tree.results)
    assert tree.examples_scored <= 30 * N < tree.examples_scored + each
