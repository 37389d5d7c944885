"""Masks: endpoints bit for bit, coefficients on the simplex, and labels that are obeyed."""

from dataclasses import replace

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.projections import projection_simplex
from scipy.optimize import LinearConstraint, minimize
from searches import started

from megajax.errors import ConfigError
from megajax.merging.masks import FROZEN, GRANULARITIES, mask_labels, masks, nearest_on_simplex
from megajax.merging.shares import channel_shares
from megajax.program.roles import find_layers
from megajax.search.loop import Limits, run
from megajax.search.methods import EvolutionConfig, make_search

KEY = jax.random.key(0)
X = jnp.ones((1, 8, 8, 2))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(nn.relu(x).mean((1, 2)))


def random_parent(seed):
    """Random weights everywhere, negative zeros among them, positive variances."""
    tree = jax.eval_shape(Net().init, KEY, X)
    keys = iter(jax.random.split(jax.random.key(seed), 99))
    tree = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), tree)
    tree["params"]["conv"]["bias"] = tree["params"]["conv"]["bias"].at[0].set(-0.0)
    tree["batch_stats"]["norm"]["var"] = jnp.abs(tree["batch_stats"]["norm"]["var"])
    return tree


def parents_of(K):
    """As a genome without frozen leaves stacks them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(random_parent, range(K)))


ONE = random_parent(0)
LAYERS = find_layers(Net().apply, ONE, X)


def genome_of(K, granularity, **options):
    return masks(ONE, K, granularity=granularity, layers=LAYERS, **options)


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


NUM_GENES = {"global": 1, "layer": 2, "leaf": 8, "channel": 4 + 3, "element": 72 + 4 * 5 + 12 + 3}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_are_those_of_the_mix_at_one_hot_masks_too(granularity):
    K, genome = 3, genome_of(3, granularity)
    parents, direction = parents_of(K), random_parent(9)

    def along(genes):
        rows = jax.tree.map(lambda a, b: (a * b).sum(), genome.express(genes, parents), direction)
        return sum(jax.tree.leaves(rows))

    inside = jax.random.dirichlet(KEY, jnp.ones(K), (genome.num_genes,))
    one_hot = jnp.zeros((genome.num_genes, K)).at[:, 1].set(1.0)
    gradients = jax.jit(jax.vmap(jax.grad(along)))(jnp.stack([inside, one_hot]))
    expected = np.zeros((genome.num_genes, K))  # the mix is linear: the same everywhere
    pairs = zip(*map(jax.tree.leaves, (genome.labels.tree, parents, direction)), strict=True)
    for label, rows, toward in pairs:
        whole = np.broadcast_to(label, toward.shape)
        for k in range(K):
            np.add.at(expected[:, k], whole, np.float64(rows[k]) * toward)
    np.testing.assert_allclose(gradients[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradients[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("K", [2, 5])
def test_one_hot_masks_give_back_a_parent_bit_for_bit(granularity, K):
    parents = parents_of(K)
    genome = genome_of(K, granularity)
    assert genome.num_genes == NUM_GENES[granularity]
    for k in range(K):
        genes = jnp.zeros((genome.num_genes, K)).at[:, k].set(1.0)
        for express in (genome.express, jax.jit(genome.express)):
            assert bits(express(genes, parents)) == bits(random_parent(k))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equal_coefficients_give_the_average_and_any_others_the_labelled_mix(granularity):
    parents = parents_of(3)
    genome = genome_of(3, granularity)
    average = genome.express(jnp.full((genome.num_genes, 3), 1 / 3), parents)
    chex.assert_trees_all_close(
        average, jax.tree.map(lambda leaf: leaf.mean(0), parents), atol=1e-6
    )
    genes = np.asarray(genome.sample(KEY, (genome.num_genes, 3), jnp.float32))
    mixed = genome.express(jnp.asarray(genes), parents)

    def oracle(label, leaf):
        coefficients = genes[np.broadcast_to(label, leaf.shape[1:])]
        return np.einsum("...k,k...->...", coefficients, np.asarray(leaf, np.float64))

    expected = jax.tree.map(oracle, genome.labels.tree, parents)
    chex.assert_trees_all_close(mixed, jax.tree.map(jnp.float32, expected), atol=1e-5)
    assert (mixed["batch_stats"]["norm"]["var"] >= 0).all()


def test_a_layers_leaves_share_a_gene_and_a_channels_numbers_do():
    labels = genome_of(2, "layer").labels.tree
    assert {int(labels["params"]["conv"]["kernel"].flat[0])} == {
        int(leaf.flat[0])
        for leaf in jax.tree.leaves([labels["params"]["norm"], labels["batch_stats"]["norm"]])
    }
    labels = genome_of(2, "channel").labels.tree
    channels = [0, 1, 2, 3]
    assert labels["params"]["conv"]["kernel"].shape == (1, 1, 1, 4)
    for leaf in jax.tree.leaves([labels["params"]["conv"], labels["batch_stats"]["norm"]]):
        assert leaf.ravel().tolist() == channels
    assert labels["params"]["head"]["bias"].tolist() == [4, 5, 6]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("K", [2, 4])
def test_first_population_holds_parents_and_mean_and_lies_on_the_simplex(binary, K):
    genome = genome_of(K, "channel", binary=binary)
    genes = np.asarray(jax.jit(genome.init, static_argnums=1)(KEY, 40))
    assert genes.shape == (40, 7, K)
    np.testing.assert_array_equal(genes[:K], np.repeat(np.eye(K)[:, None], 7, axis=1))
    if binary:
        assert set(np.unique(genes)) == {0.0, 1.0}
    else:
        np.testing.assert_allclose(genes[K], 1 / K)
    np.testing.assert_allclose(genes.sum(-1), 1, atol=1e-6)
    assert (genes >= 0).all()
    assert len(np.unique(genes, axis=0)) > 20
    with pytest.raises(ConfigError, match=f"population_size is {K - 1}.* {K} parents"):
        genome.init(KEY, K - 1)


def test_without_the_parents_first_all_of_the_population_is_random():
    genome = replace(genome_of(2, "channel"), parents_first=False)
    genes = np.asarray(genome.init(KEY, 5))
    assert genes.shape == (5, 7, 2)
    assert (genes < 1).any(axis=(1, 2)).all()
    assert genome.init(KEY, 1).shape == (1, 7, 2)


@pytest.mark.parametrize("K", [2, 3])
def test_random_genes_are_uniform_on_the_simplex(K):
    genes = np.asarray(genome_of(K, "global").sample(KEY, (20_000, 1, K), jnp.float32))[:, 0]
    np.testing.assert_allclose(genes.sum(-1), 1, atol=1e-6)
    ordered = np.sort(genes[:, 0])  # of K coordinates each is Beta(1, K - 1)
    expected = 1 - (1 - ordered) ** (K - 1)
    assert np.abs(expected - np.linspace(0, 1, 20_000)).max() < 1.95 / np.sqrt(20_000)


@pytest.mark.parametrize("low", [0.0, -0.2])
@pytest.mark.parametrize("K", [2, 3])
def test_repair_is_the_nearest_point_with_so_large_coefficients(K, low):
    genome = genome_of(K, "channel", low=low)
    genes = np.asarray(jax.random.normal(KEY, (6, 7, K)))
    repaired = np.asarray(jax.jit(genome.repair)(genes))
    np.testing.assert_allclose(repaired.sum(-1), 1, atol=1e-5)
    assert repaired.min() >= low - 1e-6
    for point, found in zip(genes.reshape(-1, K), repaired.reshape(-1, K), strict=True):
        solved = minimize(
            lambda x, point=point: np.square(x - point).sum(),
            np.full(K, 1 / K),
            jac=lambda x, point=point: 2 * (x - point),
            bounds=[(low, None)] * K,
            constraints=[LinearConstraint(np.ones(K), 1, 1)],
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        np.testing.assert_allclose(found, solved.x, atol=1e-4)


@pytest.mark.parametrize("low", [0.0, -0.2])
@pytest.mark.parametrize("K", [2, 3, 5])
def test_what_lies_in_the_space_is_not_touched_by_repair(K, low):
    genome = genome_of(K, "channel", low=low)
    repair = jax.jit(genome.repair)
    inside = genome.sample(KEY, (50, 7, K), jnp.float32)
    inside = low + (1 - K * low) * inside  # uniform in the space
    inside = np.concatenate([inside, np.repeat(np.eye(K, dtype=np.float32)[:, None], 7, 1)])
    np.testing.assert_array_equal(repair(inside), inside)
    once = repair(3 * jax.random.normal(KEY, (200, 7, K)))
    np.testing.assert_allclose(repair(once), once, atol=1e-6)


def test_what_is_almost_a_parent_becomes_one():
    genome = genome_of(3, "global")
    genes = jnp.array([[[1.7, -0.4, 0.1]], [[1 + 3e-7, -2e-7, 1e-7]], [[-0.5, 1e-7, 1.4]]])
    expected = [[[1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0]]]
    assert genome.repair(genes).tolist() == expected


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("granularity", ["leaf", "element"])
def test_beyond_the_parents_a_network_is_on_their_plane_and_one_hot_is_one_of_them(granularity, K):
    parents = parents_of(K)
    genome = genome_of(K, granularity, low=-0.2)
    express = jax.jit(genome.express)
    genes = np.asarray(genome.repair(jax.random.normal(KEY, (genome.num_genes, K))))
    assert genes.min() < 0

    def oracle(label, leaf):
        coefficients = genes[np.broadcast_to(label, leaf.shape[1:])]
        return np.einsum("...k,k...->...", coefficients, np.asarray(leaf, np.float64))

    expected = jax.tree.map(oracle, genome.labels.tree, parents)
    chex.assert_trees_all_close(
        express(genes, parents), jax.tree.map(jnp.float32, expected), atol=1e-5
    )
    for k in range(K):
        one_hot = jnp.zeros((genome.num_genes, K)).at[:, k].set(1.0)
        assert bits(express(one_hot, parents)) == bits(random_parent(k))


def test_a_whole_share_of_one_parent_is_not_that_parent_if_others_have_shares_too():
    parents = [{"w": np.float32([0])}, {"w": np.float32([10])}, {"w": np.float32([1])}]
    genome = masks(parents[0], 3, granularity="global", low=-0.5)
    mixed = genome.express(jnp.array([[1.0, 0.5, -0.5]]), genome.stack(parents))
    assert mixed["w"].tolist() == [4.5]


def test_binary_repair_picks_the_largest():
    genome = genome_of(3, "layer", binary=True)
    genes = jnp.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
    assert genome.repair(genes).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_frozen_leaves_and_whole_numbers_stay_with_parent_0():
    trees = [
        {"w": np.full(3, k, np.float32), "v": np.full(2, k, np.float32), "n": np.array(k)}
        for k in range(2)
    ]
    genome = masks(trees[0], 2, granularity="leaf", freeze="^v$")
    parents = genome.stack(trees)
    assert {name: np.shape(leaf) for name, leaf in parents.items()} == {
        "w": (2, 3),
        "v": (2,),
        "n": (),
    }
    assert genome.num_genes == 1
    mixed = genome.express(jnp.array([[0.0, 1.0]]), parents)
    assert mixed["w"].tolist() == [1, 1, 1]
    assert mixed["v"].tolist() == [0, 0]
    assert mixed["n"] == 0
    rows = genome.rows(parents)
    assert [row is None for row in rows] == [True, True, False]  # n, v, w


def test_variables_may_be_shapes_or_have_python_numbers():
    shapes = jax.eval_shape(lambda: ONE)
    assert masks(shapes, 2, granularity="leaf") == masks(ONE, 2, granularity="leaf")
    network = {"n": 3, "scale": 1.5, "w": np.zeros(2, np.float32)}
    genome = masks(network, 2, granularity="leaf")
    assert genome.num_genes == 2
    mixed = genome.express(jnp.full((2, 2), 0.5), genome.stack([network, network]))
    assert (mixed["n"], mixed["scale"]) == (3, 1.5)


def test_a_users_labels_may_be_a_prefix_and_freeze_single_elements():
    trees = [
        {"a": {"w": np.full((2, 3), k, np.float32), "b": np.zeros(3, np.float32)}} for k in (0, 1)
    ]
    genome = masks(trees[0], 2, labels={"a": np.array([0, FROZEN, 1])})
    assert genome.num_genes == 2
    mixed = genome.express(jnp.array([[0.0, 1.0], [0.25, 0.75]]), genome.stack(trees))
    assert mixed["a"]["w"].tolist() == [[1.0, 0.0, 0.75]] * 2


def test_several_patterns_freeze_and_genes_are_numbered_anew():
    network = {name: np.zeros(2, np.float32) for name in ("a", "b", "c", "d")}
    genome = masks(network, 2, granularity="element", freeze=["^a$", "c"])
    labels = {name: np.unique(label).tolist() for name, label in genome.labels.tree.items()}
    assert labels == {"a": [-1], "b": [0, 1], "c": [-1], "d": [2, 3]}
    assert genome.num_genes == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "neuron"}, "genome.granularity is 'neuron': choose one of global"),
        ({"freeze": "nothing"}, "genome.freeze is 'nothing': it matches no leaf"),
        ({"freeze": "."}, "no leaf is left"),
        ({"freeze": "("}, "genome.freeze is '\\('"),
        ({"labels": {"w": 0.5}}, "labels of leaf w are float64"),
        ({"labels": {"w": np.zeros((2, 2), int)}}, "labels of leaf w have shape \\(2, 2\\)"),
        ({"labels": {"w": -2}}, "labels of leaf w go down to -2"),
        ({"labels": {"w": np.array([0, 0, 2])}}, "labels skip gene 1"),
        ({"labels": {"v": 0}}, "labels is not a prefix"),
        ({"granularity": "layer", "layers": {"v": 0}}, "layers does not have the structure of the"),
    ],
)
def test_choices_that_cannot_work_are_named(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        masks({"w": np.zeros(3, np.float32)}, 2, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_parents_are_mixed_in_float32(dtype):
    trees = [{"w": np.array([1.0, -0.0], dtype)}, {"w": np.array([3.0, 1.0], dtype)}]
    genome = masks(trees[0], 2, granularity="global")
    parents = genome.stack(trees)
    mixed = genome.express(jnp.array([[1 / 3, 2 / 3]]), parents)["w"]
    assert mixed.dtype == dtype
    assert mixed[0] == dtype(1 / 3 + 2)
    for k in range(2):
        one = genome.express(jnp.eye(2)[k][None], parents)
        assert bits(one) == bits(trees[k])


def test_complex_leaves_are_mixed():
    trees = [{"w": np.array([1 + 2j], np.complex64)}, {"w": np.array([3 - 2j], np.complex64)}]
    genome = masks(trees[0], 2, granularity="global")
    mixed = genome.express(jnp.array([[0.25, 0.75]]), genome.stack(trees))["w"]
    assert mixed.dtype == np.complex64
    assert mixed.tolist() == [2.5 - 1j]


def test_labels_number_all_elements_once_at_element_granularity():
    labels = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(mask_labels(ONE, "element"))])
    assert sorted(labels.tolist()) == list(range(NUM_GENES["element"]))


def test_masks_with_equal_choices_are_equal():
    made = [
        [
            genome_of(2, "channel"),
            genome_of(3, "channel"),
            genome_of(2, "layer"),
            genome_of(2, "channel", binary=True),
            genome_of(2, "channel", low=-0.2),
            genome_of(2, "channel", freeze="head"),
        ]
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert [hash(one) for one in made[0]] == [hash(one) for one in made[1]]
    assert len(set(made[0])) == 6


# Shares ---------------------------------------------------------------------------------------


def numbered(K=2):
    """Parents whose every number is their own, so that a network says what is in it."""
    return [jax.tree.map(lambda leaf, k=k: np.zeros_like(leaf) + k, ONE) for k in range(K)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_channel_shares_are_what_is_expressed(granularity):
    genome = genome_of(2, granularity)
    parents = genome.stack(numbered())
    genes = genome.sample(KEY, (genome.num_genes, 2), jnp.float32)
    network = genome.express(genes, parents)
    shares = channel_shares(genome, genes, ONE)
    assert set(shares) == {"conv", "norm", "head"}
    for name, expected in [
        ("conv", network["params"]["conv"]["kernel"].mean((0, 1, 2))),
        ("head", network["params"]["head"]["kernel"].mean(0)),
    ]:
        np.testing.assert_allclose(shares[name][:, 1], expected, atol=1e-6)
        np.testing.assert_allclose(shares[name].sum(1), 1, atol=1e-6)
    assert shares["norm"].shape == (4, 2)


def test_frozen_channels_are_parent_0s():
    genome = genome_of(2, "channel", freeze="head")
    shares = channel_shares(genome, np.full((4, 2), 0.5), ONE)
    assert shares["head"].tolist() == [[1.0, 0.0]] * 3
    assert shares["conv"].tolist() == [[0.5, 0.5]] * 4


# The search -----------------------------------------------------------------------------------


def distance(problem, genes):
    """How far networks are from a target; the genome is a static part of the problem."""
    genome, parents, target = problem

    def error(genes):
        differences = jax.tree.map(jnp.subtract, genome.express(genes, parents), target)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(differences))

    return -jax.vmap(error)(genes)


@pytest.mark.parametrize("binary", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "granularity",
    [g if g == "channel" else pytest.param(g, marks=pytest.mark.slow) for g in GRANULARITIES],
)
def test_the_search_finds_a_planted_mask(granularity, binary):
    genome = genome_of(2, granularity, binary=binary)
    parents = genome.stack(numbered())
    planted = genome.sample(jax.random.key(5), (genome.num_genes, 2), jnp.float32)

    def evaluate(problem, genes):
        return distance((genome, *problem), genes)

    problem = jax.device_put((parents, genome.express(planted, parents)))
    search = make_search(EvolutionConfig(population_size=64), genome, evaluate, None)
    start = started(search, jax.jit(genome.init, static_argnums=1)(KEY, 64), problem)
    state, _ = run(KEY, search, start, problem, Limits(200, per_call=200))
    miss = np.abs(np.asarray(state.best.genes - planted)).max(axis=-1)
    if binary:
        assert miss.max() == 0
    else:
        assert miss.mean() < 0.05, miss.mean()


@pytest.mark.parametrize("total", [1.0, 1.6])
@pytest.mark.parametrize("K", [2, 3, 8])
def test_the_nearest_point_of_the_simplex_is_optaxs(K, total):
    rng = np.random.default_rng(K)
    points = rng.normal(scale=2, size=(300, K)).astype(np.float32)
    points[:50] = np.round(points[:50])  # ties
    points[50:60] = 1 / K
    points[60:70] = np.eye(K)[rng.integers(K, size=10)]
    ours = np.stack(nearest_on_simplex(list(points.T), total), axis=-1)
    expected = jax.jit(jax.vmap(lambda point: projection_simplex(point, total)))(points)
    np.testing.assert_allclose(ours, expected, atol=3e-6)
    np.testing.assert_allclose(ours.sum(-1), total, atol=3e-6)
    assert ours.min() >= 0
