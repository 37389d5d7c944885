"""The lattice over the simplex, and the best of given points."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import megajax as mj
from megajax.baselines.searches import best_point, simplex_lattice
from megajax.errors import ConfigError


@pytest.mark.parametrize("num_parents", [2, 3, 4, 7])
@pytest.mark.parametrize("limit", [8, 9, 40, 101])
def test_the_lattice_covers_the_simplex_within_its_limit(num_parents, limit):
    points = simplex_lattice(num_parents, limit)
    assert points.shape[1] == num_parents
    assert len(points) <= limit
    np.testing.assert_allclose(points.sum(axis=1), 1, atol=1e-6)
    assert (points >= 0).all()
    assert len(np.unique(points.round(6), axis=0)) == len(points)
    np.testing.assert_array_equal(points[:num_parents], np.eye(num_parents))
    np.testing.assert_allclose(points[num_parents], 1 / num_parents)
    # Steps of 1 / m, and no finer lattice would have kept within the limit.
    inner = points[num_parents + 1 :]
    m = round(1 / inner[inner > 0].min()) if len(inner) else 1
    np.testing.assert_allclose(inner * m, np.round(inner * m), atol=1e-5)
    assert len(points) <= limit < math.comb(m + num_parents, num_parents - 1) + 1 or m == 1


@pytest.mark.parametrize("limit", [3, 4, 21, 22])
def test_two_parents_make_an_evenly_cut_line(limit):
    shares = np.sort(simplex_lattice(2, limit)[:, 1])
    odd = limit - (limit % 2 == 0)
    np.testing.assert_allclose(shares, np.linspace(0, 1, odd), atol=1e-6)


def test_a_limit_without_room_for_the_mean_is_refused():
    with pytest.raises(ConfigError, match=r"budget is 3: 3 parents and their mean need at least 4"):
        simplex_lattice(3, 3)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 99])
def test_best_point_is_argmax_whatever_the_batch(batch_size):
    points = np.random.default_rng(0).uniform(size=(10, 1, 2)).astype(np.float32)

    def sum_of(outputs, targets):
        return jnp.where(outputs > 1, jnp.nan, outputs)

    problem = mj.problem_for(
        lambda w, x: x * w,
        [np.float32(0.9), np.float32(0.8)],
        mj.Task(np.ones(3, np.float32), metric=sum_of),
        genome=mj.GenomeConfig(granularity="leaf"),
    )
    genes, fitness = best_point(problem, jnp.asarray(points), batch_size)
    sums = points[:, 0] @ [0.9, 0.8]
    expected = np.where(sums > 1, -np.inf, sums)
    assert np.isneginf(expected).any()
    np.testing.assert_allclose(fitness, expected, rtol=1e-6)
    np.testing.assert_array_equal(genes, points[expected.argmax()])
