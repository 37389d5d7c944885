"""Means against NumPy in float64, and SLERP against the textbook's formula."""

import chex
import jax
import numpy as np
import pytest

from megajax.baselines import slerp, uniform_average
from megajax.errors import ConfigError, ParentsError

SHAPES = {"bias": (3,), "kernel": (4, 3), "one": (1,), "scalar": ()}


def network(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: np.float32(scale * rng.normal(size=shape)) for name, shape in SHAPES.items()}


PARENTS = [network(seed, scale) for seed, scale in enumerate((1.0, 3.0, 0.5))]


def test_the_average_is_numpys():
    uniform = uniform_average(PARENTS)
    for name in SHAPES:
        columns = np.stack([np.float64(parent[name]) for parent in PARENTS])
        np.testing.assert_allclose(uniform[name], columns.mean(axis=0), rtol=1e-5, atol=1e-7)


def test_the_average_of_one_is_that_one():
    chex.assert_trees_all_equal(uniform_average(PARENTS[:1]), PARENTS[0])


def test_averages_run_under_jit():
    for method in (uniform_average, slerp):
        mix = jax.jit(chex.assert_max_traces(method, n=1))
        for pair in (PARENTS[:2], PARENTS[1:]):
            chex.assert_trees_all_close(mix(pair), method(pair), rtol=1e-5)


def by_the_book(a, b, t):
    a, b = np.float64(a), np.float64(b)
    cosine = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())
    angle = np.arccos(np.clip(cosine, -1, 1))
    if np.sin(angle) < 1e-3:
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_the_textbooks_leaf_by_leaf(share):
    a, b = PARENTS[:2]
    merged = slerp([a, b], share)
    for name in SHAPES:
        np.testing.assert_allclose(merged[name], by_the_book(a[name], b[name], share), rtol=1e-5)


def test_slerp_keeps_the_length_that_the_average_loses():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=2000).astype(np.float32) for _ in range(2))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    assert np.linalg.norm(slerp([a, b])) == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(uniform_average([a, b])) == pytest.approx(2**-0.5, abs=0.05)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, 2.0], [2.0, 4.0]),  # parallel
        ([1.0, 2.0], [-2.0, -4.0]),  # opposite
        ([0.0, 0.0], [3.0, 1.0]),  # zero
        ([0.0], [0.0]),
        ([2.0], [-1.0]),  # a tiny leaf has no angle but 0 and 180 degrees
        ([1.0, 0.0], [1.0, 1e-4]),  # nearly parallel
    ],
)
def test_slerp_without_a_plane_is_the_straight_line(a, b):
    a, b = np.float32(a), np.float32(b)
    np.testing.assert_allclose(slerp([a, b], 0.25), 0.75 * a + 0.25 * b, rtol=1e-4, atol=1e-6)


def test_slerp_says_what_it_cannot_do():
    with pytest.raises(ParentsError, match="two parents: 3 are given"):
        slerp(PARENTS)
    with pytest.raises(ConfigError, match=r"share is 1\.5"):
        slerp(PARENTS[:2], 1.5)
