"""Parents: what fits together is stacked, what does not is named."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.errors import MegajaxError, ParentsError
from megajax.trees import (
    check_parents,
    checked_parents,
    keep_leaves,
    leaf_paths,
)


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


def test_checked_parents_are_the_same_on_the_host():
    parents = [variables(seed) for seed in range(3)]
    chex.assert_trees_all_equal(checked_parents(parents), jax.device_get(parents))


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (
            "params/Dense_0/kernel",
            lambda leaf: leaf[:, :2],
            "leaf params/Dense_0/kernel: float32[4,3] in parent 0 but float32[4,2] in parent 1; "
            "keep={pattern: parent} can leave leaves to one parent",
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
        checked_parents([variables(0), changed(path, change)])
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


def test_all_leaves_that_differ_are_listed_with_all_parents_they_differ_in():
    parents = [
        {"a": np.ones(2), "b": np.ones(3), "c": np.ones(4)},
        {"a": np.ones(2), "b": np.ones(5), "c": np.ones(4, np.float32)},
        {"a": np.ones(2), "b": np.ones(6), "d": np.ones(1)},
    ]
    with pytest.raises(ParentsError) as error:
        check_parents(parents)
    assert str(error.value) == (
        "leaf b: float64[3] in parent 0 but float64[5] in parent 1, float64[6] in parent 2; "
        "leaf c: float64[4] in parent 0 but float32[4] in parent 1, no such leaf in parent 2; "
        "leaf d: no such leaf in parent 0 but float64[1] in parent 2; "
        "keep={pattern: parent} can leave leaves to one parent"
    )


def test_kept_leaves_are_their_parents_everywhere():
    parents = [{"body": np.full(2, k), "head": np.full(k + 2, k)} for k in range(3)]
    kept = keep_leaves(parents, {"^head$": 1})
    assert [parent["head"].tolist() for parent in kept] == [[1, 1, 1]] * 3
    assert [parent["body"].tolist() for parent in kept] == [[0, 0], [1, 1], [2, 2]]
    assert checked_parents(parents, {"head": 2})[0]["head"].tolist() == [2] * 4
    assert parents[0]["head"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"tail": 0}, "keep 'tail' matches no leaf, such as body"),
        ({"head": 2}, "keep 'head' is 2: the parents are 0 to 1"),
        ({"head": True}, "keep 'head' is True"),
        ({"head(": 0}, "keep 'head\\(' is not a regular expression"),
        ({"head": 0, "ea": 1}, "keep gives leaf head to both parent 0 and 1"),
        ({"only": 0}, "leaf only is left to parent 0, which has no such leaf"),
    ],
)
def test_a_keep_that_cannot_work_is_named(keep, message):
    parents = [{"body": 1, "head": 2}, {"body": 1, "head": 2, "only": 3}]
    with pytest.raises(ParentsError, match=message):
        keep_leaves(parents, keep)


def test_other_containers_one_parent_and_no_leaves_are_refused():
    with pytest.raises(ParentsError, match="parent 1 has the leaves of parent 0 in other"):
        check_parents([[np.ones(2)], (np.ones(2),)])
    with pytest.raises(ParentsError, match="1 parent given"):
        check_parents([variables(0)])
    with pytest.raises(ParentsError, match="no leaves"):
        check_parents([{}, {}])
