"""Parents: what fits together is stacked, what does not is named."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.errors import MegajaxError, ParentsError
from megajax.parents import check_parents, leaf_paths, stack_parents, unstack_parents


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


def variables(seed):
    return Net().init(jax.random.key(seed), jnp.ones((1, 8, 8, 1)))


def changed(path, change):
    """Parent 1 with one leaf changed."""
    tree = variables(1)
    paths = leaf_paths(tree)
    leaves, treedef = jax.tree.flatten(tree)
    leaves[paths.index(path)] = change(leaves[paths.index(path)])
    return jax.tree.unflatten(treedef, leaves)


def test_stack_and_unstack_are_inverse_bit_for_bit():
    parents = [variables(seed) for seed in range(3)]
    stacked = stack_parents(parents)
    for leaf, one in zip(jax.tree.leaves(stacked), jax.tree.leaves(parents[0]), strict=True):
        assert leaf.shape == (3, *one.shape)
    chex.assert_trees_all_equal(unstack_parents(stacked), parents)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (
            "params/Dense_0/kernel",
            lambda leaf: leaf[:, :2],
            "leaf params/Dense_0/kernel: float32[4,3] in parent 0 but float32[4,2] in parent 1",
        ),
        (
            "params/Conv_0/bias",
            lambda leaf: leaf.astype(jnp.bfloat16),
            "leaf params/Conv_0/bias: float32[4] in parent 0 but bfloat16[4] in parent 1",
        ),
        (
            "batch_stats/BatchNorm_0/var",
            lambda leaf: leaf.at[2].set(jnp.nan),
            "leaf batch_stats/BatchNorm_0/var of parent 1: 1 of 4 values are not finite",
        ),
        (
            "params/Conv_0/kernel",
            lambda leaf: leaf * jnp.inf,
            "leaf params/Conv_0/kernel of parent 1: 36 of 36 values are not finite",
        ),
    ],
)
def test_the_leaf_at_fault_is_named(path, change, message):
    with pytest.raises(ParentsError) as error:
        stack_parents([variables(0), changed(path, change)])
    assert str(error.value) == message
    assert isinstance(error.value, MegajaxError)


def test_a_missing_leaf_is_named_whichever_parent_lacks_it():
    short = {"params": {"w": np.ones(2)}}
    long = {"params": {"w": np.ones(2), "v": np.ones(3)}}
    with pytest.raises(ParentsError, match=r"leaf params/v: float64\[3\] .* but no such leaf in"):
        check_parents([long, short])
    with pytest.raises(
        ParentsError, match=r"leaf params/v: no such leaf .* float64\[3\] in parent"
    ):
        check_parents([short, long])


def test_other_containers_one_parent_and_no_leaves_are_refused():
    with pytest.raises(ParentsError, match="parent 1 has the leaves of parent 0 in other"):
        check_parents([[np.ones(2)], (np.ones(2),)])
    with pytest.raises(ParentsError, match="1 parent given"):
        check_parents([variables(0)])
    with pytest.raises(ParentsError, match="no leaves"):
        check_parents([{}, {}])
