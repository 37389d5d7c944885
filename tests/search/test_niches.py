"""Niches: against a NumPy transliteration of M2N2's description, and what the search promises."""

from itertools import pairwise
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.losses import softmax_cross_entropy_with_integer_labels as softmax_cross_entropy
from searches import assert_it_goes_on_bit_identical, started
from sklearn.datasets import load_digits

import megajax as mj
from megajax.errors import ConfigError
from megajax.merging.merge import search_of
from megajax.merging.presets import m2n2
from megajax.search import operators
from megajax.search.loop import Limits, _generations, run
from megajax.search.niches import Niches, attraction, shared_fitness
from megajax.search.operators import split_point
from megajax.types import bind

KEY = jax.random.key(5)


class Aux(NamedTuple):
    right: jax.Array


def near(target, genes):
    """A network is right on the i-th example where its i-th gene is near the target's."""
    right = abs(genes - target) < 0.3
    return right.mean(axis=1, dtype=jnp.float32), Aux(right)


TARGET = jnp.ones(12)
HALVES = jnp.stack([jnp.arange(12) < 6, jnp.arange(12) >= 6]).astype(jnp.float32)


# M2N2, transliterated -----------------------------------------------------------------------------


def m2n2_mating(scores, alpha=1.0):
    """Probabilities of the first parent, and of the second for each first (section 3 of the paper).

    f(i) = sum_j s(i, j) / z_j^alpha, z_j = sum_i s(i, j);
    g(a, b) = sum_j max(0, s(b, j) - s(a, j)) / z_j^alpha.
    """
    z = scores.sum(axis=0)
    resources = scores / np.where(z > 0, z, 1) ** alpha
    first = resources.sum(axis=1) / resources.sum()
    gains = np.maximum(0, resources[None] - resources[:, None]).sum(axis=2)
    return first, gains


def m2n2_child(a, b, mixing, split):
    """slerp(a, b; w_m) before the split, slerp(a, b; 1 - w_m) behind, of whole vectors."""
    omega = np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1))
    weight = np.where(np.arange(len(a)) < split, mixing, 1 - mixing)
    if np.sin(omega) <= 1e-6:
        return (1 - weight) * a + weight * b
    return np.sin((1 - weight) * omega) / np.sin(omega) * a + (
        np.sin(weight * omega) / np.sin(omega) * b
    )


def m2n2_fitness_with(scores, child, alpha=1.0):
    """Shared fitness of the archive and the child; the least of them goes, the child if it is."""
    everyone = np.vstack([scores, child[None]])
    z = everyone.sum(axis=0)
    return (everyone / np.where(z > 0, z, 1) ** alpha).sum(axis=1)


def mlp(variables, inputs):
    kernel, bias, last, last_bias = variables
    return jax.nn.relu(inputs @ kernel + bias) @ last + last_bias


def specialists(hidden=32):
    """Digits, and two networks that know five of them each."""
    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = inputs[:400].astype(np.float32), labels[:400]
    grad = jax.jit(jax.grad(lambda v, x, y: softmax_cross_entropy(mlp(v, x), y).mean()))

    def trained(key, chosen):
        shapes = [(64, hidden), (hidden,), (hidden, 10), (10,)]
        keys = jax.random.split(key, 4)
        v = [0.05 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
        for _ in range(60):
            v = jax.tree.map(lambda w, g: w - 0.02 * g, v, grad(v, inputs[chosen], labels[chosen]))
        return jax.tree.map(np.asarray, v)

    return [trained(jax.random.key(0), labels < 5), trained(jax.random.key(1), labels >= 5)], (
        inputs,
        labels,
    )


@pytest.fixture(scope="module")
def digits():
    return specialists()


def flat(genes, who):
    return np.concatenate([np.asarray(leaf[who], np.float64).ravel() for leaf in genes])


def test_the_preset_is_m2n2_generation_by_generation(digits):
    parents, (inputs, labels) = digits
    states = []
    sections = m2n2(generations=60)
    sections["evolution"] = sections["evolution"].replace(generations_per_chunk=1)
    result = mj.merge(
        KEY,
        mlp,
        parents,
        (inputs, labels),
        **sections,
        callback=lambda state, _: states.append(jax.device_get(state)),
    )
    run_key = jax.random.split(KEY, 4)[3]
    search = search_of(result.problem, sections["evolution"], sections["fitness"])
    assert search.num_offspring == 1

    def right(network):
        return np.argmax(mlp(network, inputs), axis=1) == labels

    # As published the archive holds the parents and is empty otherwise.
    first = states[0]
    assert int(first.counts.networks) == 2
    for place, parent in enumerate(parents):
        chex.assert_trees_all_equal([leaf[place] for leaf in first.population.genes], parent)
    assert np.isneginf(first.population.fitness[2:]).all()

    replaced = []
    for generation, (before, after) in enumerate(pairwise(states)):
        pair_key, cross_key, _ = jax.random.split(jax.random.fold_in(run_key, generation), 3)
        first_key, second_key = jax.random.split(pair_key)
        cut_key, share_key = jax.random.split(cross_key)
        scores = before.population.aux.right[:, : len(labels)]
        alive = np.isfinite(before.population.fitness)
        scores = np.asarray(scores & alive[:, None], np.float64)
        with np.errstate(divide="ignore"):
            first_chance, gains = m2n2_mating(scores)
            logits = np.log(np.float32(first_chance))
            a = int(jax.random.categorical(first_key, logits, shape=(1,))[0])
            b = int(jax.random.categorical(second_key, np.log(np.float32(gains[a]))[None])[0])
        num_weights = flat(before.population.genes, 0).size
        split = int(jax.random.randint(cut_key, (1,), 0, num_weights)[0])
        mixing = float(jax.random.uniform(share_key, (1,))[0])
        genes = before.population.genes
        child = m2n2_child(flat(genes, a), flat(genes, b), mixing, split)

        network = [
            part.reshape(leaf.shape).astype(np.float32)
            for part, leaf in zip(
                np.split(child, np.cumsum([leaf.size for leaf in parents[0]])[:-1]),
                parents[0],
                strict=True,
            )
        ]
        fitness = m2n2_fitness_with(scores, np.asarray(right(network), np.float64))
        worst = int(np.argmin(fitness))
        changed = [
            place
            for place in range(20)
            if not np.array_equal(
                flat(after.population.genes, place), flat(before.population.genes, place)
            )
            or after.population.fitness[place] != before.population.fitness[place]
        ]
        assert changed == ([] if worst == 20 else [worst])
        if changed:
            np.testing.assert_allclose(
                flat(after.population.genes, worst), child, rtol=1e-4, atol=1e-5
            )
            assert (
                np.mean(after.population.aux.right[worst][: len(labels)] != right(network)) < 0.01
            )
        replaced += changed
    assert replaced[:18] == list(range(2, 20))  # empty places first
    assert len(replaced) > 25  # and others later
    assert result.evaluations == 62


def test_shared_fitness_and_attraction_are_the_published_sums():
    right = np.random.default_rng(0).random((7, 30)) < 0.4
    right[:, 3] = False
    for alpha in (0.0, 0.5, 1.0, 2.0):
        first, gains = m2n2_mating(right.astype(float), alpha)
        shared = np.asarray(shared_fitness(jnp.array(right), alpha))
        np.testing.assert_allclose(shared / shared.sum(), first, rtol=1e-5)
        np.testing.assert_allclose(attraction(jnp.array(right), alpha), gains, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(shared_fitness(jnp.array(right), 0.0), right.sum(axis=1))


# The crossover ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(), (1, 0)])
def test_split_point_mixes_before_the_cut_and_the_other_way_behind(order):
    rng = np.random.default_rng(1)
    first, second = ([rng.normal(size=(50, 3)), rng.normal(size=(50, 2, 2))] for _ in range(2))
    first, second = (jax.tree.map(jnp.float32, one) for one in (first, second))
    cut_key, share_key = jax.random.split(KEY)
    cut = np.asarray(jax.random.randint(cut_key, (50,), 0, 7))
    mixing = np.asarray(jax.random.uniform(share_key, (50,)))
    assert set(cut) == set(range(7))
    for spherical in (False, True):
        children = split_point(KEY, first, second, spherical=spherical, order=order)

        def row(tree, i, order=order):
            return np.concatenate([np.asarray(tree[j][i]).ravel() for j in order or (0, 1)])

        for i in range(50):
            a, b = row(first, i), row(second, i)
            weight = np.where(np.arange(7) < cut[i], mixing[i], 1 - mixing[i])
            line = (1 - weight) * a + weight * b
            expected = m2n2_child(a, b, mixing[i], cut[i]) if spherical else line
            np.testing.assert_allclose(row(children, i), expected, rtol=2e-4, atol=1e-5)


def test_the_arc_has_no_holes():
    a = jnp.array([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [1.0, 0.0]])
    b = jnp.array([[1.0, 2.0], [1.0, 2.0], [2.0, 4.0], [-1.0, 0.0]])
    child = split_point(KEY, a, b, spherical=True)
    assert np.isfinite(child).all()
    np.testing.assert_allclose(child[0], a[0], rtol=1e-5)


def test_a_mask_of_the_pair_stays_a_mask_on_the_line():
    rng = np.random.default_rng(0)
    first, second = (jnp.float32(rng.dirichlet(np.ones(3), (8, 5))) for _ in range(2))
    child = split_point(KEY, first, second, gene_ndim=1)
    np.testing.assert_allclose(child.sum(axis=-1), 1, rtol=1e-5)
    # One coefficient for a whole gene, whatever its length.
    share = (child - first) / jnp.where(abs(second - first) > 1e-3, second - first, jnp.nan)
    assert np.nanmax(np.nanmax(share, axis=-1) - np.nanmin(share, axis=-1)) < 1e-3


# The search ---------------------------------------------------------------------------------------


def test_specialists_mate_with_who_is_right_where_they_are_wrong():
    search = Niches(near, 200)
    # Three copies of one specialist, and one of the other: only the other kind can add anything.
    genes = HALVES[jnp.array([0, 0, 0, 1])]
    state = started(search, genes, TARGET)
    first, second = search._pairs(KEY, state.population)
    assert ((np.asarray(first) == 3) != (np.asarray(second) == 3)).all()
    # Six examples each: three share theirs, so the odd one out is drawn as often as they are.
    assert 0.4 < (np.asarray(first) == 3).mean() < 0.6
    blind = Niches(near, 200, matchmaker=False)
    first, second = blind._pairs(KEY, state.population)
    assert ((np.asarray(first) == 3) == (np.asarray(second) == 3)).mean() > 0.3


def test_clones_mate_with_each_other_and_one_alone_with_itself():
    search = Niches(near, 50)
    first, second = search._pairs(
        KEY, started(search, HALVES[jnp.zeros(3, int)], TARGET).population
    )
    assert (first != second).all()
    alone = Niches(near, 50, founders=1)
    first, second = alone._pairs(KEY, started(alone, HALVES[jnp.zeros(3, int)], TARGET).population)
    assert (first == 0).all()
    assert (second == 0).all()
    nobody = started(search, jnp.zeros((3, 12)), TARGET).population  # right on nothing
    first, _ = search._pairs(KEY, nobody)
    assert set(np.asarray(first).tolist()) == {0, 1, 2}


def test_competition_keeps_a_specialist_that_fitness_alone_drops():
    genes = jnp.stack([jnp.arange(12) < n for n in (8, 8, 8)] + [jnp.arange(12) >= 8])
    genes = genes.astype(jnp.float32)
    better = jnp.broadcast_to((jnp.arange(12) < 9).astype(jnp.float32), (1, 12))
    for alpha, specialist_stays in ((1.0, True), (0.0, False)):
        search = Niches(near, 1, cross=bind(given, child=tuple(better[0].tolist())), alpha=alpha)
        state, _ = search.step(KEY, started(search, genes, TARGET), TARGET)
        right = np.asarray(state.population.aux.right)
        assert (right[:, 11].any()) == specialist_stays
        assert right.sum(axis=1).max() == 9


def given(key, first, second, *, child):
    return jnp.broadcast_to(jnp.array(child), first.shape)


@pytest.mark.slow
def test_children_enter_one_after_the_other():
    """Eight children at once are eight archive updates of the description, in turn."""
    genes = jax.random.uniform(jax.random.key(1), (10, 12), minval=0.5, maxval=1.5)
    search = Niches(near, 8, mutate=bind(operators.gaussian, rate=0.5, scale=0.4))
    state = started(search, genes, TARGET)
    after, _ = search.step(KEY, state, TARGET)
    keys = jax.random.split(KEY, 3)
    pairs = search._pairs(keys[0], state.population)
    children = search.cross(keys[1], *(genes[who] for who in pairs))
    children = search.mutate(keys[2], children)
    scores = np.asarray(near(TARGET, genes)[1].right, float)
    archive = np.array(genes)
    for child, right in zip(children, near(TARGET, children)[1].right, strict=True):
        worst = int(np.argmin(m2n2_fitness_with(scores, np.asarray(right, float))))
        if worst < 10:
            archive[worst], scores[worst] = child, right
    np.testing.assert_allclose(after.population.genes, archive, rtol=1e-6)


def test_what_is_no_number_never_enters_and_never_wins():
    def broken(target, genes):
        fitness, aux = near(target, genes)
        return jnp.where(jnp.arange(len(genes)) % 2 == 0, jnp.nan, fitness), aux

    search = Niches(broken, 6, founders=4)
    genes = jax.random.uniform(jax.random.key(1), (10, 12), minval=0.5, maxval=1.5)
    start = started(search, genes, TARGET)
    state, infos = run(KEY, search, start, TARGET, Limits(10, per_call=5))
    assert (infos.invalid == 3).all()
    assert np.isfinite(state.best.fitness)
    # Two of the founders and all empty places are replaced by what has a number.
    assert np.isfinite(state.population.fitness).all()


@pytest.mark.parametrize("stop", [1, 6])
def test_it_goes_on_bit_identical(stop):
    search = Niches(near, 5, mutate=bind(operators.gaussian, rate=0.2, scale=0.3), founders=2)
    genes = jnp.concatenate([HALVES, jnp.zeros((6, 12))])
    start = started(search, genes, TARGET)
    assert_it_goes_on_bit_identical(KEY, search, start, TARGET, stop)
    assert int(start.counts.networks) == 2


def test_it_is_a_value_and_compiles_once():
    def new():
        return Niches(near, 5, mutate=bind(operators.gaussian, rate=0.2), alpha=0.5)

    assert new() == new()
    assert hash(new()) == hash(new())
    assert new() != Niches(near, 5)
    genes = jax.random.uniform(KEY, (8, 12))
    before = _generations._cache_size()
    for target in (TARGET, 2 * TARGET):
        run(KEY, new(), started(new(), genes, target), target, Limits(6, per_call=3))
    assert _generations._cache_size() == before + 1


# Through `merge` ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "genome",
    [
        {},
        {"granularity": "layer", "binary": True},
        {"kind": "task_vectors"},
        {"kind": "weights"},
    ],
)
def test_it_searches_genes_of_every_kind(digits, genome):
    parents, data = digits
    vectors = genome.get("kind") == "task_vectors"
    result = mj.merge(
        KEY,
        mlp,
        parents,
        data,
        base=jax.tree.map(lambda a, b: (a + b) / 2, *parents) if vectors else None,
        genome=mj.GenomeConfig(**genome),
        fitness=mj.FitnessConfig(metric="accuracy"),
        evolution=mj.EvolutionConfig(
            method="niches", population_size=12, generations=12, generations_per_chunk=6
        ),
    )
    assert result.fitness >= result.parent_fitness.max()
    assert result.evaluations == 12 * 13
    genes = result.state.population.genes
    repaired = result.genome.repair(genes)
    chex.assert_trees_all_close(repaired, genes, atol=1e-6)
    if genome.get("binary"):
        assert set(np.unique(genes)) == {0.0, 1.0}
    right = np.asarray(result.state.population.aux.right)
    np.testing.assert_allclose(right.sum(axis=1) / 400, result.state.population.fitness, atol=1e-6)


@pytest.mark.slow
def test_examples_of_all_tasks_are_shared_and_padding_is_nobodys(digits):
    parents, (inputs, labels) = digits
    tasks = [
        mj.Task(inputs[labels < 5], labels[labels < 5], "accuracy"),
        mj.Task(inputs[labels >= 5], labels[labels >= 5], "cross_entropy"),
    ]
    result = mj.merge(
        KEY,
        mlp,
        parents,
        tasks,
        fitness=mj.FitnessConfig(batch_size=64),
        evolution=mj.EvolutionConfig(method="niches", population_size=8, generations=3),
    )
    best = result.state.best
    assert best.aux.right.shape[0] >= 400
    logits = np.asarray(mlp(result.variables, inputs))
    assert best.aux.right.sum() == (logits.argmax(axis=1) == labels).sum()


@pytest.mark.slow
def test_a_mesh_finds_the_same(digits):
    parents, data = digits

    def genes_on(devices):
        evolution = mj.EvolutionConfig(method="niches", population_size=6, generations=4)
        fitness = mj.FitnessConfig(metric="accuracy", devices=devices)
        return mj.merge(KEY, mlp, parents, data, fitness=fitness, evolution=evolution)

    one, three = genes_on(1), genes_on(3)
    np.testing.assert_allclose(one.state.population.fitness, three.state.population.fitness)
    np.testing.assert_allclose(one.genes, three.genes, rtol=1e-6)


def test_what_cannot_work_is_refused(digits):
    parents, (inputs, _) = digits
    evolution = mj.EvolutionConfig(method="niches", population_size=6, generations=1)
    targets = np.zeros((400, 10), np.float32)
    with pytest.raises(ConfigError, match=r"niches.*needs tasks with labels"):
        mj.merge(KEY, mlp, parents, (inputs, targets), evolution=evolution)
    cut = evolution.replace(crossover=lambda key, first, second: first[:-1])
    with pytest.raises(ConfigError, match=r"evolution\.crossover gives"):
        mj.merge(KEY, mlp, *digits, evolution=cut)
    racing = mj.FitnessConfig(racing_examples=100)
    with pytest.raises(ConfigError, match="only the genetic algorithm races"):
        mj.merge(KEY, mlp, *digits, fitness=racing, evolution=evolution)


def test_leaves_of_weights_are_cut_in_the_order_of_the_program():
    variables = {"a_last": np.ones((4, 3)), "b": np.ones(4), "z_first": np.ones((2, 4))}

    def network(v, x):
        return jnp.tanh(x @ v["z_first"] + v["b"]) @ v["a_last"]

    problem = mj.problem_for(
        network,
        [jax.tree.map(np.float32, variables)] * 2,
        (np.ones((5, 2), np.float32), np.zeros(5, int)),
        genome=mj.GenomeConfig(kind="weights"),
    )
    assert problem.genome.order == (1, 2, 0)  # b and z_first are one layer
    search = search_of(problem, mj.EvolutionConfig(method="niches"))
    assert dict(search.cross.options)["order"] == (1, 2, 0)
