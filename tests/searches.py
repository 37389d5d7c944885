"""What the tests of every kind of search ask of it."""

import chex
import jax
import numpy as np

from megajax.search.genetic import run


def assert_it_goes_on_bit_identical(key, algorithm, start, stop):
    """Ten generations straight through are ten with a stop after some of them, bit for bit."""
    straight, infos = run(key, algorithm, start, 10, generations_per_chunk=4)
    half, early = run(key, algorithm, start, stop, generations_per_chunk=4)
    resumed, late = run(key, algorithm, half, 10, generations_per_chunk=4)
    chex.assert_trees_all_equal(resumed, straight)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), early, late)
    chex.assert_trees_all_equal(joined, infos)
