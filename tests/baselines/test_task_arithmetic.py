"""Task arithmetic, TIES and DARE against NumPy, element by element, and at their edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.baselines import dare, task_arithmetic, ties, uniform_average
from megajax.baselines.task_arithmetic import drop, elect, task_vectors, trim
from megajax.errors import ConfigError, ParentsError

SHAPES = {"bias": (3,), "kernel": (5, 4), "one": (1,), "scalar": ()}
KEY = jax.random.key(0)


def network(seed):
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in SHAPES.items()}


BASE, *PARENTS = [network(seed) for seed in range(4)]


def flat(tree):
    return np.concatenate([np.ravel(np.float64(leaf)) for leaf in jax.tree.leaves(tree)])


def ties_by_hand(base, parents, density, scale):
    """Algorithm 1 of the paper in plain loops."""
    vectors = []
    for parent in parents:
        vector = flat(parent) - flat(base)
        count = round(density * vector.size)
        keep = np.argsort(-np.abs(vector), kind="stable")[:count]
        trimmed = np.zeros_like(vector)
        trimmed[keep] = vector[keep]
        vectors.append(trimmed)
    merged = []
    for values in zip(*vectors, strict=True):
        positive = sum(v for v in values if v > 0)
        negative = -sum(v for v in values if v < 0)
        if positive > negative:
            agreeing = [v for v in values if v > 0]
        elif negative > positive:
            agreeing = [v for v in values if v < 0]
        else:
            agreeing = [0.0]
        merged.append(sum(agreeing) / len(agreeing))
    return flat(base) + scale * np.array(merged)


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_task_arithmetic_is_numpys(scale):
    expected = flat(BASE) + scale * sum(flat(parent) - flat(BASE) for parent in PARENTS)
    merged = task_arithmetic(PARENTS, BASE, scale=scale)
    np.testing.assert_allclose(flat(merged), expected, rtol=1e-5, atol=1e-6)


def test_task_arithmetic_with_one_over_k_is_the_mean():
    merged = task_arithmetic(PARENTS, BASE, scale=1 / 3)
    chex.assert_trees_all_close(merged, uniform_average(PARENTS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("density", [0.0, 0.04, 0.2, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_ties_is_algorithm_1(density, scale):
    merged = ties(PARENTS, BASE, density=density, scale=scale)
    expected = ties_by_hand(BASE, PARENTS, density, scale)
    np.testing.assert_allclose(flat(merged), expected, rtol=1e-5, atol=1e-6)


def test_ties_of_the_election_and_zeros():
    vectors = np.float32([[2, 1, 0, 0, -1, 3], [-2, 0, 0, 4, -2, -1], [0, 3, 0, 0, 1, -1]])
    #         exact tie -> 0, zeros do not count, all zero, one alone, two agree, larger mass wins
    merged = elect([{"w": v} for v in vectors])["w"]
    assert merged.tolist() == [0.0, 2.0, 0.0, 4.0, -1.5, 3.0]


@pytest.mark.parametrize(
    ("values", "density", "expected"),
    [
        ([3, -1, 2, 0], 0.5, [3, 0, 2, 0]),
        ([1, -1, 1, 1], 0.25, [1, -1, 1, 1]),  # equals of the last one kept are kept
        ([3, -1, 2, 0], 0.0, [0, 0, 0, 0]),
        ([3, -1, 2, 0], 1.0, [3, -1, 2, 0]),
        ([5], 0.4, [0]),
        ([5], 0.6, [5]),
        ([0, 0], 0.5, [0, 0]),
    ],
)
def test_trim_keeps_the_largest_of_the_whole_vector(values, density, expected):
    assert trim({"w": jnp.float32(values)}, density)["w"].tolist() == expected
    # Split into tiny leaves it is the same vector.
    leaves = trim([jnp.float32([value]) for value in values], density)
    assert [float(leaf[0]) for leaf in leaves] == expected


def test_dare_at_its_edges():
    at_one = dare(KEY, PARENTS, BASE, density=1.0, scale=0.4)
    chex.assert_trees_all_close(at_one, task_arithmetic(PARENTS, BASE, scale=0.4), rtol=1e-6)
    chex.assert_trees_all_equal(dare(KEY, PARENTS, BASE, density=0.0), BASE)
    chex.assert_trees_all_equal(ties(PARENTS, BASE, density=0.0), BASE)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_what_dare_keeps_is_the_right_share_and_right_on_average(density):
    kept = np.asarray(drop(KEY, {"w": jnp.ones(40_000)}, density)["w"])
    assert set(np.unique(kept)) == {0, np.float32(1 / density)}
    spread = np.sqrt((1 - density) / density / kept.size)
    assert abs(kept.mean() - 1) < 5 * spread


def test_dare_draws_anew_for_each_leaf_parent_and_key():
    base = {"a": jnp.zeros(400), "b": jnp.zeros(400)}
    ones = jax.tree.map(jnp.ones_like, base)
    merged = dare(KEY, [ones], base, scale=1.0)
    assert not np.array_equal(merged["a"], merged["b"])
    both = dare(KEY, [ones, ones], base, scale=1.0)["a"]
    assert {0.0, 2.0, 4.0} == set(np.unique(both).tolist())
    chex.assert_trees_all_equal(dare(KEY, [ones], base, scale=1.0), merged)
    other = dare(jax.random.key(1), [ones], base, scale=1.0)
    assert not np.array_equal(other["a"], merged["a"])


def test_small_differences_survive_low_precision_until_the_end():
    base = {"w": jnp.array([1.0], jnp.bfloat16), "step": np.int32(5)}
    parents = [{"w": jnp.array([1 + 2**-7], jnp.bfloat16), "step": np.int32(9)}] * 2
    (vector, _) = task_vectors(parents, base)
    assert vector["w"].dtype == jnp.float32
    assert float(vector["w"][0]) == 2**-7
    assert float(vector["step"]) == 0
    merged = task_arithmetic(parents, base, scale=1.0)
    assert merged["step"] == 5
    assert merged["w"].dtype == jnp.bfloat16
    assert float(merged["w"][0]) == 1 + 2**-6


def test_what_cannot_be_is_one_line():
    for density in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=f"density is {density}"):
            ties(PARENTS, BASE, density=density)
        with pytest.raises(ConfigError, match=f"density is {density}"):
            dare(KEY, PARENTS, BASE, density=density)
    with pytest.raises(ParentsError, match="leaf bias has shape"):
        task_arithmetic(PARENTS, {**BASE, "bias": np.ones(4, np.float32)})
