"""A genome of weights: the individual is the network, and noise goes only where it may."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.config import GenomeConfig
from megajax.merging.genome import recalibrated, weights
from megajax.merging.merge import algorithm_for, genome_for, shares_of
from megajax.merging.shares import projected_shares
from megajax.program.batchnorm import recalibrate
from megajax.program.roles import find_statistics
from megajax.run.config import from_dict

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
    return jax.tree.map(lambda *leaves: np.stack(leaves), *[network(k) for k in range(K)])


def genome_of(parents, **options):
    one = jax.tree.map(lambda leaf: leaf[0], parents)
    return weights(parents, statistics=find_statistics(apply_fn, one, X), **options)


def first_population(genome, size, parents):
    return jax.jit(genome.init, static_argnums=1)(KEY, size, parents)


def bits(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).tobytes(), tree)


def test_first_population_is_the_parents_their_mean_and_points_between_them():
    K = 3
    parents = parents_of(K)
    genome = genome_of(parents)
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
    genome = genome_of(parents, parents_first=False)
    genes = first_population(genome, 400, parents)
    gap = np.asarray(parents["a"][1] - parents["a"][0], np.float64)
    share = np.tensordot(np.asarray(genes["a"]) - np.asarray(parents["a"][0]), gap, 2)
    share = np.sort(share / (gap**2).sum())
    assert 0 < share[0] < share[-1] < 1
    distance = np.abs(share - (np.arange(400) + 0.5) / 400).max()  # Kolmogorov and Smirnov's
    assert distance < 1.95 / 20  # exceeded once in a thousand


def test_frozen_and_whole_number_leaves_have_no_gene_and_half_precision_evolves_in_float32():
    trees = [
        {"w": jnp.full(3, 1.0 + 2 * k, jnp.bfloat16), "v": jnp.full(2, float(k)), "n": k}
        for k in range(2)
    ]
    parents = mj.stack_parents(trees)
    genome = weights(parents, freeze="^v$")
    assert genome.num_genes == 1
    genes = first_population(genome, 4, parents)
    assert genes["v"] is None
    assert genes["n"] is None
    assert genes["w"].dtype == jnp.float32
    for k in range(2):
        one = genome.express({"w": genes["w"][k], "v": None, "n": None}, parents)
        chex.assert_trees_all_equal(one, trees[k] | {"v": trees[0]["v"], "n": parents["n"][0]})
        assert one["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize(("relative", "on_statistics"), [(True, False), (False, True)])
def test_noise_hits_whole_leaves_at_its_rate_and_of_its_size(relative, on_statistics):
    parents = jax.tree.map(lambda leaf: 7 * leaf, parents_of(2))
    genome = genome_of(parents, relative_noise=relative, noise_on_statistics=on_statistics)
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
    repaired = genome_of(parents).repair(genes)
    assert (repaired.pop("d") == 0).all()
    chex.assert_trees_all_equal(repaired, {n: leaf for n, leaf in genes.items() if n != "d"})
    as_published = genome_of(parents, clip_variances=False)
    chex.assert_trees_all_equal(as_published.repair(genes), genes)


def test_recalibrated_candidates_have_their_own_statistics_and_parents_keep_theirs():
    parents = parents_of(2)
    plain = genome_of(parents)
    genome = recalibrated(plain, apply_fn)
    genes = first_population(genome, 5, parents)
    networks = jax.jit(jax.vmap(genome.express, (0, None)))(genes, (parents, X))
    for i, found in enumerate(mj.unstack_parents(networks)):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], genes)
        if i < 2:
            assert bits(found) == bits(network(i))
        else:
            expected = jax.jit(lambda one: recalibrate(apply_fn, one, X))(one)
            chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
            assert not np.allclose(found["c"], one["c"], atol=1e-3)


@pytest.mark.slow
def test_merging_weights_is_never_below_the_best_parent_and_its_fitness_is_its_own():
    trees = [network(k) for k in range(3)]
    evolution = mj.EvolutionConfig(population_size=8, generations=4)
    genome = GenomeConfig(kind="weights")
    align = mj.AlignConfig(method="none")
    result = mj.merge(
        KEY, apply_fn, trees, (X, LABELS), align=align, genome=genome, evolution=evolution
    )
    assert result.fitness > result.parent_fitness.max()
    chex.assert_trees_all_equal_shapes_and_dtypes(result.variables, trees[0])
    for tree, fitness in [
        *zip(trees, result.parent_fitness, strict=True),
        (result.variables, result.fitness),
    ]:
        nll = mj.measure(mj.predict(apply_fn, tree, X), LABELS).nll
        np.testing.assert_allclose(-nll, fitness, rtol=1e-5)
    for shares in shares_of(result).values():
        assert sum(shares) == pytest.approx(1)


def test_projected_shares_are_the_coefficients_of_a_mix_and_the_nearest_ones_off_the_plane():
    parents = parents_of(3)
    mixed = jax.tree.map(lambda leaf: 0.7 * leaf[0] - 0.1 * leaf[1] + 0.4 * leaf[2], parents)
    for found in projected_shares({"m": mixed}, {"m": parents}).values():
        np.testing.assert_allclose(found, [0.7, -0.1, 0.4], atol=1e-5)
    pair = {"m": {"k": jnp.array([[0.0, 0.0], [4.0, 0.0]]), "b": jnp.zeros((2, 1))}}
    off = {"m": {"k": jnp.array([1.0, 9.0]), "b": jnp.array([5.0])}}
    np.testing.assert_allclose(projected_shares(off, pair)["m"], [0.75, 0.25])
    same = {"m": {"k": jnp.ones((2, 3))}}
    np.testing.assert_allclose(projected_shares({"m": {"k": jnp.zeros(3)}}, same)["m"], [0.5, 0.5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"genome": {"kind": "genes"}}, "genome.kind is 'genes': choose one of masks, weights"),
        (
            {"genome": {"parents_first": False}},
            "parents_first is False: genome.kind 'masks' has no",
        ),
        ({"genome": {"kind": "weights", "binary": True}}, "binary is True: genome.kind 'weights'"),
        (
            {"genome": {"kind": "weights", "granularity": "leaf"}},
            "granularity is 'leaf': genome.kind 'weights' has no such choice",
        ),
        (
            {"genome": {"kind": "weights"}, "evolution": {"mutation": ("gaussian", "reset")}},
            "evolution.mutation is .*'reset'.*: genome.kind 'weights' has nothing",
        ),
    ],
)
def test_choices_that_the_kind_does_not_have_are_refused(values, message):
    with pytest.raises(mj.ConfigError, match=message) as error:
        from_dict(values)
    assert "\n" not in str(error.value)


def test_labels_and_reset_are_refused_where_only_the_library_could_know():
    parents = parents_of(2)
    config = GenomeConfig(kind="weights")
    with pytest.raises(mj.ConfigError, match="labels are for masks"):
        genome_for(apply_fn, parents, X, config, labels=0)
    genome = genome_for(apply_fn, parents, X, config)
    ga = algorithm_for(
        genome,
        lambda genes: (genes["a"].sum((1, 2)), ()),
        mj.EvolutionConfig(population_size=4, mutation="reset"),
    )
    with pytest.raises(mj.ConfigError, match="nothing to draw new genes from"):
        jax.eval_shape(lambda: ga.step(KEY, ga.init(KEY, genome.init(KEY, 4, parents))))
