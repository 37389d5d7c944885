"""A genome of weights: the individual is the network, and noise goes only where it may."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.merging.genome import GenomeConfig, make_genome
from megajax.merging.merge import search_of
from megajax.merging.shares import projected_shares
from megajax.search.genetic import check_operators

KEY = jax.random.key(0)
X = np.random.default_rng(1).normal(size=(24, 5)).astype(np.float32)
LABELS = np.arange(24) % 3


def apply_fn(w, x):
    """Dense, BatchNorm under names that say nothing, dense."""
    z = x @ w["a"]
    z = (z - w["c"]) * jax.lax.rsqrt(w["d"] + 1e-5) * w["e"]
    return jnp.tanh(z) @ w["b"]


SHAPES = {"a": (5, 100), "b": (100, 3), "c": (100,), "d": (100,), "e": (100,)}


def network(seed):
    rng = np.random.default_rng(seed)
    tree = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    tree["e"][0] = -0.0
    return tree | {"d": np.abs(tree["d"])}


def parents_of(K):
    """As a genome without frozen leaves stacks them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[network(k) for k in range(K)])


def genome_of(K=2, variables=None, **options):
    config = GenomeConfig(kind="weights", **options)
    return make_genome(apply_fn, variables or network(0), X, K, config)


def first_population(genome, size, parents):
    return jax.jit(genome.init, static_argnums=1)(KEY, size, parents)


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


def test_first_population_is_the_parents_their_mean_and_points_between_them():
    K = 3
    parents = parents_of(K)
    genome = genome_of(K)
    assert genome.num_genes == 5
    genes = first_population(genome, 12, parents)
    for k in range(K):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], genes)
        assert bits(genome.express(one, parents)) == bits(network(k))
    mean = jax.tree.map(lambda leaf: leaf[K], genes)
    chex.assert_trees_all_close(mean, jax.tree.map(lambda leaf: leaf.mean(0), parents), atol=1e-5)
    flat = np.concatenate([leaf.reshape(12, -1) for leaf in jax.tree.leaves(genes)], axis=1)
    corners = np.concatenate([leaf.reshape(K, -1) for leaf in jax.tree.leaves(parents)], axis=1)
    coefficients, *_ = np.linalg.lstsq(corners.T.astype(np.float64), flat.T, rcond=None)
    np.testing.assert_allclose(coefficients.T @ corners, flat, atol=1e-4)  # one mix for all leaves
    np.testing.assert_allclose(coefficients.sum(0), 1, atol=1e-5)
    assert coefficients.min() > -1e-5
    with pytest.raises(mj.ConfigError, match=f"population_size is {K}: .* {K} parents and their"):
        genome.init(KEY, K, parents)


def test_random_points_of_the_segment_are_uniform_and_no_parent_is_among_them():
    parents = parents_of(2)
    genome = genome_of(parents_first=False)
    genes = first_population(genome, 400, parents)
    gap = np.asarray(parents["a"][1] - parents["a"][0], np.float64)
    share = np.tensordot(np.asarray(genes["a"]) - np.asarray(parents["a"][0]), gap, 2)
    share = np.sort(share / (gap**2).sum())
    assert 0 < share[0] < share[-1] < 1
    distance = np.abs(share - (np.arange(400) + 0.5) / 400).max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / 20  # exceeded once in a thousand


def test_frozen_and_whole_number_leaves_have_no_gene_and_half_precision_evolves_in_float32():
    def linear(w, x):
        return x @ w["w"].astype(jnp.float32) + w["v"]

    trees = [
        {
            "w": np.full((5, 2), 1.0 + 2 * k, jnp.bfloat16),
            "v": np.full(2, k, np.float32),
            "n": np.array(k),
        }
        for k in range(2)
    ]
    genome = make_genome(linear, trees[0], X, 2, GenomeConfig(kind="weights", freeze="^v$"))
    assert genome.num_genes == 1
    parents = jax.tree.map(jnp.asarray, genome.stack(trees))
    assert parents["w"].shape == (2, 5, 2)
    assert parents["v"].shape == (2,)
    genes = first_population(genome, 4, parents)
    assert genes["v"] is None
    assert genes["n"] is None
    assert genes["w"].dtype == jnp.float32
    for k in range(2):
        one = genome.express({"w": genes["w"][k], "v": None, "n": None}, parents)
        chex.assert_trees_all_equal(one, trees[k] | {"v": trees[0]["v"], "n": trees[0]["n"]})
        assert one["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("relative", "on_statistics"), [(True, False), (False, True)])
def test_noise_hits_whole_leaves_at_its_rate_and_of_its_size(relative, on_statistics):
    parents = jax.tree.map(lambda leaf: 7 * leaf, parents_of(2))
    genome = genome_of(relative_noise=relative, noise_on_statistics=on_statistics)
    one = jax.tree.map(lambda leaf: leaf[0], parents)
    genes = jax.tree.map(lambda leaf: np.repeat(leaf[None], 500, axis=0), one)
    noisy = jax.jit(lambda genes: genome.noise(KEY, genes, rate=0.2, scale=0.1))(genes)
    for name, leaf in one.items():
        difference = np.asarray(noisy[name] - genes[name], np.float64).reshape(500, -1)
        hit = (difference != 0).any(axis=1)
        if name in "cd" and not on_statistics:
            assert not hit.any()
            continue
        assert abs(hit.sum() - 100) < 4 * np.sqrt(500 * 0.2 * 0.8)
        spread = 0.1 * np.std(leaf) if relative else 0.1
        np.testing.assert_allclose(difference[hit].std(), spread, rtol=0.02)
        assert (difference[hit].std(axis=1) > spread / 2).all()  # all of the leaf, or nothing


def test_negative_variances_are_clipped_and_nothing_else_is():
    parents = parents_of(2)
    genes = jax.tree.map(lambda leaf: leaf - 10, parents)
    repaired = genome_of().repair(genes)
    assert (repaired.pop("d") == 0).all()
    chex.assert_trees_all_equal(repaired, {n: leaf for n, leaf in genes.items() if n != "d"})
    as_published = genome_of(clip_variances=False)
    chex.assert_trees_all_equal(as_published.repair(genes), genes)


def test_merging_weights_is_never_below_the_best_parent_and_its_fitness_is_its_own():
    trees = [network(k) for k in range(3)]
    result = mj.merge(
        KEY,
        apply_fn,
        trees,
        (X, LABELS),
        align=mj.AlignConfig(method="none"),
        genome=GenomeConfig(kind="weights"),
        evolution=mj.EvolutionConfig(population_size=8, generations=4),
    )
    assert result.fitness > result.parent_fitness.max()
    chex.assert_trees_all_equal_shapes_and_dtypes(result.variables, trees[0])
    for tree, fitness in [
        *zip(trees, result.parent_fitness, strict=True),
        (result.variables, result.fitness),
    ]:
        nll = mj.measure(mj.predict(apply_fn, tree, X), LABELS).nll
        np.testing.assert_allclose(-nll, fitness, rtol=1e-5)
    for shares in projected_shares(result.variables, result.parents).values():
        assert sum(shares) == pytest.approx(1)


def test_projected_shares_are_the_coefficients_of_a_mix_and_the_nearest_ones_off_the_plane():
    trees = [network(k) for k in range(3)]
    mixed = jax.tree.map(lambda a, b, c: 0.7 * a - 0.1 * b + 0.4 * c, *trees)
    for found in projected_shares({"m": mixed}, [{"m": tree} for tree in trees]).values():
        np.testing.assert_allclose(found, [0.7, -0.1, 0.4], atol=1e-5)
    pair = [{"m": {"k": np.array([0.0, 0.0]), "b": np.zeros(1), "n": np.array(k)}} for k in (0, 1)]
    pair[1]["m"]["k"] = np.array([4.0, 0.0])
    off = {"m": {"k": np.array([1.0, 9.0]), "b": np.array([5.0]), "n": np.array(0)}}
    np.testing.assert_allclose(projected_shares(off, pair)["m"], [0.75, 0.25])
    same = [{"m": {"k": np.ones(3)}}] * 2
    np.testing.assert_allclose(projected_shares({"m": {"k": np.zeros(3)}}, same)["m"], [0.5, 0.5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "genes"}, "genome.kind is 'genes': 'masks', 'task_vectors' or 'weights' is"),
        ({"parents_first": False}, "parents_first is False: genome.kind 'masks' has no"),
        ({"kind": "weights", "binary": True}, "binary is True: genome.kind 'weights'"),
        (
            {"kind": "weights", "granularity": "leaf"},
            "granularity is 'leaf': genome.kind 'weights' has no such choice",
        ),
        ({"kind": "weights", "low": -0.1}, "low is -0.1: genome.kind 'weights' has no such choice"),
    ],
)
def test_choices_that_the_kind_does_not_have_are_refused(values, message):
    with pytest.raises(mj.ConfigError, match=message) as error:
        GenomeConfig(**values)
    assert "\n" not in str(error.value)


def test_labels_and_reset_are_refused():
    parents = [network(k) for k in range(2)]
    config = GenomeConfig(kind="weights")
    with pytest.raises(mj.ConfigError, match="labels are for masks"):
        make_genome(apply_fn, parents[0], X, 2, config, labels=0)
    problem = mj.problem_for(apply_fn, parents, (X, LABELS), genome=config)
    evolution = mj.EvolutionConfig(population_size=4, mutation="reset")
    search = search_of(problem, evolution)
    genes = jax.eval_shape(lambda: problem.genome.init(KEY, 4, problem.parents))
    message = "evolution.mutation failed: genome.kind is 'weights': there is nothing to draw new"
    with pytest.raises(mj.ConfigError, match=message):
        check_operators(search, genes)


def test_equal_choices_are_equal():
    made = [[genome_of(), genome_of(3), genome_of(clip_variances=False)] for _ in range(2)]
    assert made[0] == made[1]
    assert len({*made[0], *made[1]}) == 3
