"""What the tests of every kind of search ask of it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from megajax.search.loop import Limits, first_state, run
from megajax.types import Key

LIMITS = Limits(10, per_call=4)


def started(search, genes, problem, key: Key | None = None):
    """The state of the first population."""
    return first_state(search, jax.random.key(0) if key is None else key, genes, problem)


def first(state):
    """The first individual of each leaf, and so on: a population as a list."""
    size = len(jax.tree.leaves(state)[0])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(size)]


def assert_it_goes_on_bit_identical(key, search, start, problem, stop):
    """Ten generations straight through are ten with a stop after some of them, bit for bit."""
    straight, infos = run(key, search, start, problem, LIMITS)
    half, early = run(key, search, start, problem, LIMITS._replace(generations=stop))
    resumed, late = run(key, search, jax.device_get(half), problem, LIMITS)
    chex.assert_trees_all_equal(resumed, straight)
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), early, late)
    chex.assert_trees_all_equal(joined, infos)


def shifted(target, genes):
    """The fitness of genes `[P, G]`: the nearer to the target `[G]`, the higher."""
    return -jnp.sum((genes - target) ** 2, axis=-1)
