"""Task vectors: parents and base bit for bit, and TIES' trimming written down in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.errors import ConfigError, ParentsError
from megajax.merging.genome import make_genome
from megajax.merging.masks import masks
from megajax.merging.task_vectors import SCALES, TaskVectors

KEY = jax.random.key(0)
K = 3
RNG = np.random.default_rng(0)


def network(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    tree = {
        "kernel": rng.normal(size=(4, 6)).astype(dtype),
        "bias": rng.normal(size=6).astype(dtype),
        "steps": np.int32(7),
    }
    tree["kernel"][0, :3] = -0.0
    return tree


BASE, *PARENTS = [network(seed) for seed in range(1 + K)]


def genome_of(granularity="leaf", freeze=None, **options):
    line = masks(BASE, K, granularity=granularity, freeze=freeze)
    return TaskVectors(line.labels, K, line.num_genes, **options)


def bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in sorted(tree.items())}


def constant(genome, scales, density=None):
    """Genes that are alike everywhere."""
    row = [*scales, *([] if density is None else density)]
    return jnp.broadcast_to(jnp.array(row, jnp.float32), (genome.num_genes, len(row)))


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("granularity", ["global", "channel", "element"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_one_hot_genes_are_a_parent_and_zeros_are_the_base_bit_for_bit(trim, granularity, dtype):
    base, *parents = [network(seed, dtype) for seed in range(1 + K)]
    genome = genome_of(granularity, trim=trim)
    stacked = genome.stack(parents, base)
    express = jax.jit(genome.express)
    density = [1.0] * K if trim else None
    for k, parent in enumerate(parents):
        found = express(constant(genome, np.eye(K)[k], density), stacked)
        assert bits(found) == bits(parent)
    assert bits(express(constant(genome, [0.0] * K, density), stacked)) == bits(base)
    if trim:  # nothing is left of the vectors
        assert bits(express(constant(genome, [1.0] * K, [0.0] * K), stacked)) == bits(base)


@pytest.mark.parametrize("granularity", ["leaf", "channel", "element"])
def test_any_genes_scale_the_vectors_as_the_labels_say(granularity):
    genome = genome_of(granularity, low=-1.0)
    genes = np.asarray(jax.random.normal(KEY, (genome.num_genes, K)))
    found = jax.jit(genome.express)(genes, genome.stack(PARENTS, BASE))
    for name in ("kernel", "bias"):
        label = np.broadcast_to(genome.labels.tree[name], BASE[name].shape)
        vectors = np.stack([np.float64(parent[name]) - BASE[name] for parent in PARENTS], axis=-1)
        expected = BASE[name] + (genes[label] * vectors).sum(-1)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)
    assert found["steps"] == 7


@pytest.mark.parametrize("granularity", ["global", "channel", "element"])
@pytest.mark.parametrize("scales", [[0.3, 0.0, 1.4], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
def test_gradients_are_those_of_the_sum_at_a_parent_and_at_the_base_too(granularity, scales):
    genome = genome_of(granularity)
    stacked = genome.stack(PARENTS, BASE)

    def total(genes):
        found = genome.express(genes, stacked)
        return found["kernel"].sum() + found["bias"].sum()

    found = jax.grad(total)(constant(genome, scales))
    expected = np.zeros((genome.num_genes, K))
    for name in ("kernel", "bias"):
        label = np.broadcast_to(genome.labels.tree[name], BASE[name].shape)
        for k, parent in enumerate(PARENTS):
            np.add.at(expected[:, k], label, np.float64(parent[name]) - BASE[name])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.04, 0.2, 0.5, 0.97, 1.0])
def test_trimming_keeps_the_largest_of_each_leaf(density):
    """TIES' first step, leaf by leaf, and the plain sum in place of its election."""
    genome = genome_of("leaf", trim=True)
    scales = [0.3, 0.7, 1.4]
    genes = constant(genome, scales, [density] * K)
    found = jax.jit(genome.express)(genes, genome.stack(PARENTS, BASE))
    for name in ("kernel", "bias"):
        expected = np.float64(BASE[name])
        for scale, parent in zip(scales, PARENTS, strict=True):
            vector = (np.float64(parent[name]) - BASE[name]).ravel()
            kept = np.zeros_like(vector)
            largest = np.argsort(-abs(vector), kind="stable")[: int(np.ceil(density * vector.size))]
            kept[largest] = vector[largest]
            expected = expected + scale * kept.reshape(BASE[name].shape)
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_a_density_is_a_genes_own_share_of_the_largest_in_its_leaf():
    genome = genome_of("channel", trim=True)
    genes = np.ones((genome.num_genes, 2 * K), np.float32)
    labels = genome.labels.tree["kernel"]
    chosen = int(labels.ravel()[2])
    genes[chosen, K:] = 0.25
    found = jax.jit(genome.express)(jnp.asarray(genes), genome.stack(PARENTS, BASE))["kernel"]
    vectors = np.stack([np.float64(parent["kernel"]) - BASE["kernel"] for parent in PARENTS])
    ranks = (-abs(vectors)).reshape(K, -1).argsort(1).argsort(1).reshape(vectors.shape)
    kept = np.where(ranks < 0.25 * 24, vectors, 0)  # of the whole leaf
    expected = BASE["kernel"] + vectors.sum(0)
    expected[:, 2] = BASE["kernel"][:, 2] + kept.sum(0)[:, 2]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trim", [False, True])
def test_frozen_leaves_stay_as_in_parent_0(trim):
    genome = genome_of(freeze="bias", trim=trim)
    stacked = genome.stack(PARENTS, BASE)
    genes = constant(genome, [0.0, 1.0, 0.0], [1.0] * K if trim else None)
    found = jax.jit(genome.express)(genes, stacked)
    assert bits(found)["bias"] == bits(PARENTS[0])["bias"]
    assert bits(found)["kernel"] == bits(PARENTS[1])["kernel"]
    rows = dict(zip(sorted(BASE), genome.rows(stacked), strict=True))
    assert rows["bias"] is None
    assert rows["steps"] is None
    np.testing.assert_array_equal(rows["kernel"], [parent["kernel"] for parent in PARENTS])


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("low", [0.0, -0.5])
def test_the_first_population_is_what_one_would_try_first(low, trim):
    genome = genome_of("channel", low=low, trim=trim)
    genes = np.asarray(genome.init(KEY, 30))
    assert genes.shape == (30, genome.num_genes, 2 * K if trim else K)
    scales = genes[..., :K]
    assert (scales[:16] == scales[:16, :1]).all()  # alike for all genes
    rows = scales[:, 0].tolist()
    assert rows[:K] == np.eye(K).tolist()
    assert rows[K] == [0.0] * K
    for scale in SCALES:  # task arithmetic
        assert [np.float32(scale)] * K in rows
    assert len(np.unique(genes, axis=0)) == 30 if not trim else True
    assert (scales >= 0).all()
    assert (scales <= 1).all()
    if trim:
        assert (genes[: K + 1 + 4 + 3 * K, :, K:] == 1).all()
        assert genes[..., K:].min() >= 0
        assert genes[..., K:].max() <= 1
    with pytest.raises(ConfigError, match=f"population_size is {K}: .* {K} parents and their base"):
        genome.init(KEY, K)


def test_repair_and_samples_keep_to_the_bounds():
    genome = genome_of("element", low=-0.5, high=1.5, trim=True)
    genes = jax.random.normal(KEY, (20, genome.num_genes, 2 * K)) * 3
    repaired = np.asarray(genome.repair(genes))
    np.testing.assert_array_equal(repaired[..., :K], np.clip(genes[..., :K], -0.5, 1.5))
    np.testing.assert_array_equal(repaired[..., K:], np.clip(genes[..., K:], 0, 1))
    np.testing.assert_array_equal(genome.repair(jnp.asarray(repaired)), repaired)
    drawn = np.asarray(genome.sample(KEY, (500, genome.num_genes, 2 * K), jnp.float32))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    np.testing.assert_allclose(drawn.mean((0, 1)), 0.5, atol=0.01)


def test_equal_choices_are_equal():
    made = [
        [genome_of(), genome_of("channel"), genome_of(low=-0.1), genome_of(trim=True)]
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert len({*made[0], *made[1]}) == 4


# Through `merge` ------------------------------------------------------------------------------

X = RNG.normal(size=(30, 4)).astype(np.float32)
LABELS = (X @ PARENTS[0]["kernel"] + X @ PARENTS[1]["kernel"]).argmax(-1)


def linear(w, x):
    return x @ w["kernel"] + w["bias"]


def merge(base=BASE, genome=None, **options):
    return mj.merge(
        KEY,
        linear,
        PARENTS,
        (X, LABELS),
        base=base,
        genome=genome or mj.GenomeConfig(kind="task_vectors", granularity="leaf", trim=True),
        evolution=mj.EvolutionConfig(population_size=8, generations=4),
        **options,
    )


@pytest.fixture(scope="module")
def merged():
    return merge()


def test_a_merge_of_task_vectors_is_what_its_genes_say_and_no_worse_than_a_parent(merged):
    assert merged.genes.shape == (2, 2 * K)
    assert merged.fitness >= merged.parent_fitness.max()
    nll = mj.measure(mj.predict(linear, merged.variables, X), LABELS).nll
    np.testing.assert_allclose(merged.fitness, -nll, rtol=1e-5)
    first = merged.state.population.fitness  # the base was in the first population
    base = mj.measure(mj.predict(linear, BASE, X), LABELS).nll
    assert merged.history.best_ever[0] >= -base - 1e-5
    assert first.shape == (8,)
    # Parents of a common base are taken as they are.
    for parent, aligned in zip(PARENTS, merged.parents, strict=True):
        assert bits(parent) == bits(aligned)


def test_a_genome_object_of_task_vectors_is_the_section_that_makes_it(merged):
    config = mj.GenomeConfig(kind="task_vectors", granularity="leaf", trim=True)
    genome = make_genome(linear, BASE, X[:8], K, config)
    assert genome == merged.genome
    result = merge(genome=genome)
    assert bits(result.variables) == bits(merged.variables)


def test_what_cannot_be_is_one_line():
    with pytest.raises(ConfigError, match="kind is 'task_vectors': base, the network before, is"):
        merge(base=None)
    with pytest.raises(ParentsError, match=r"the base network \(as parent 1\) does not fit: leaf"):
        merge(base={**BASE, "bias": np.zeros(3, np.float32)})
    for values, message in (
        ({"kind": "task_vectors", "binary": True}, "binary is True: genome.kind 'task_vectors'"),
        ({"kind": "masks", "trim": True}, "trim is True: genome.kind 'masks' has no such choice"),
        ({"kind": "task_vectors", "high": 0.5}, "high is 0.5: it must be at least 1"),
        ({"kind": "task_vectors", "low": 0.5}, "low is 0.5: it must lie between -10 and 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            mj.GenomeConfig(**values)
