"""What is kept out of the mixing: statistics, integers; and what a mismatch says."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.baselines.leaves import combine, is_floating, on_weights, statistic_paths
from megajax.errors import ParentsError


def test_low_precision_is_mixed_in_float32_and_cast_back():
    # 1 + 3 * 2^-9 is no bfloat16 number: a sum in bfloat16 would lose the small ones.
    parents = [jnp.array([x], jnp.bfloat16) for x in (1.0, 2**-9, 2**-9, 2**-9)]
    total = combine(lambda leaves: leaves.sum(axis=0), parents)
    assert total.dtype == jnp.bfloat16
    assert float(total[0]) == float(jnp.bfloat16(1 + 3 * 2**-9)) > 1


def test_leaves_that_are_not_floating_are_those_of_the_first_parent():
    parents = [
        {"count": np.int32(k), "flag": np.bool_(k), "key": jax.random.key(k), "w": np.float32(k)}
        for k in (1, 2)
    ]
    merged = combine(lambda leaves: leaves.mean(axis=0), parents)
    assert merged["count"] == 1
    assert merged["flag"]
    assert (jax.random.key_data(merged["key"]) == jax.random.key_data(jax.random.key(1))).all()
    assert float(merged["w"]) == 1.5
    assert not any(is_floating(merged[name]) for name in ("count", "flag", "key"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"a": np.ones(2), "b": np.ones((3, 2))},
            r"leaf b has shape \(2,\) .* \(3, 2\) in network 1",
        ),
        ({"a": np.ones(2)}, "leaf b is not in all networks: network 1"),
        ({"a": np.ones(2), "b": np.ones(2), "c": np.ones(1)}, "leaf c is not in all networks"),
    ],
)
def test_networks_that_do_not_fit_are_named_by_leaf(other, message):
    with pytest.raises(ParentsError, match=message):
        combine(lambda leaves: leaves[0], [{"a": np.ones(2), "b": np.ones(2)}, other])


def test_statistics_are_averaged_and_no_method_sees_them():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(nn.Dense(3)(x)))

    x = jnp.ones((4, 5))
    parents = [Net().init(jax.random.key(k), x) for k in range(2)]
    parents[1] = jax.tree.map(lambda leaf: leaf + 1, parents[1])
    statistics = statistic_paths(Net().apply, parents[0], x)
    assert statistics == {"batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var"}

    seen = []

    def method(parents, base, extras):
        seen.extend([parents, extras, [base]])
        return jax.tree.map(lambda leaf: 100.0 + leaf, parents[1])

    merged = on_weights(method, statistics, parents, parents[0], [parents[0]])
    for trees in seen:
        for tree in trees:
            assert jax.tree.leaves(tree["batch_stats"]) == []
    mean = merged["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_array_equal(mean, np.full(3, 0.5))
    np.testing.assert_array_equal(
        merged["params"]["Dense_0"]["bias"], parents[1]["params"]["Dense_0"]["bias"] + 100
    )
    assert jax.tree.structure(merged) == jax.tree.structure(parents[0])
