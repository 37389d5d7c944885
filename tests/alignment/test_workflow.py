"""`align`, as users call it: found, verified, matched; and nothing compiled twice."""

import alignment_networks as networks
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_symmetries import INPUTS, mlp, mlp_variables

import megajax as mj
from megajax.alignment import permute, random_permutations
from megajax.errors import ConfigError, DataError
from megajax.zoo.networks.resnet import ResNet

KEY = jax.random.key(0)


@pytest.mark.parametrize("method", ["weights", "both"])
def test_a_permuted_copy_comes_back_bit_for_bit(method):
    apply_fn, variables, inputs = networks.linen(ResNet(3, 8, width=4), (32, 8, 8, 3))
    symmetries = mj.find_symmetries(apply_fn, variables, inputs)
    drawn = random_permutations(KEY, symmetries)
    parents = [variables, permute(symmetries, drawn, variables)]
    config = mj.AlignConfig(method=method)
    aligned, info = mj.align(KEY, apply_fn, parents, inputs, calibration=inputs, config=config)
    chex.assert_trees_all_equal(aligned[1], aligned[0], variables)
    assert set(info.permutations[1]) == {group.name for group in symmetries.groups}


def renamed(variables):
    return {f"q{i}": leaf for i, leaf in enumerate(jax.tree.leaves(variables))}


def test_statistics_are_told_by_what_they_do_not_by_their_names():
    apply_fn, variables, inputs = networks.linen(ResNet(3, 8, width=4), (8, 8, 8, 3))
    treedef = jax.tree.structure(variables)

    def plain(w, x):
        return apply_fn(jax.tree.unflatten(treedef, [w[f"q{i}"] for i in range(len(w))]), x)

    found = mj.find_symmetries(plain, renamed(variables), inputs)
    named = mj.find_symmetries(apply_fn, variables, inputs)
    assert len(found.statistics) == len(named.statistics)
    assert {path.rpartition("/")[2] for path in named.statistics} == {"mean", "var"}
    others = networks.random_variables(variables, 5)
    large = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 100 * leaf if path[-1].key in ("mean", "var") else leaf, others
    )
    ours = mj.align(KEY, plain, [renamed(variables), renamed(others)], inputs)[0][1]
    drowned = mj.align(KEY, plain, [renamed(variables), renamed(large)], inputs)[0][1]
    kernels = [name for name, leaf in ours.items() if leaf.ndim > 1]
    chex.assert_trees_all_equal(*({k: w[k] for k in kernels} for w in (ours, drowned)))


def test_choices_that_cannot_work():
    parents = [mlp_variables(), mlp_variables()]
    with pytest.raises(ConfigError, match=r"align\.reference is 2: the parents are 0 to 1"):
        mj.align(KEY, mlp, parents, INPUTS, config=mj.AlignConfig(reference=2))
    with pytest.raises(DataError, match="calibration inputs are missing"):
        mj.align(KEY, mlp, parents, INPUTS, config=mj.AlignConfig(method="both"))
    bad = np.full_like(INPUTS, np.nan)
    with pytest.raises(DataError, match=r"the calibration inputs: .* values are not finite"):
        mj.align(
            KEY, mlp, parents, INPUTS, calibration=bad, config=mj.AlignConfig(method="activations")
        )
    assert mj.align(KEY, mlp, parents, INPUTS, config=mj.AlignConfig(method="none")) == (
        parents,
        None,
    )


def test_leaves_that_are_left_to_one_parent():
    parents = [mlp_variables(), {k: v[..., ::-1].copy() for k, v in mlp_variables().items()}]
    parents[1]["w"] = parents[0]["w"]  # only the head tells the units apart
    aligned, _ = mj.align(KEY, mlp, parents, INPUTS, keep={"v": 1})
    np.testing.assert_array_equal(aligned[0]["v"], aligned[1]["v"])


class Net:
    """A network of one's own that is compared by value."""

    def __init__(self, scale):
        self.scale = scale

    def __eq__(self, other):
        return isinstance(other, Net) and self.scale == other.scale

    def __hash__(self):
        return hash(self.scale)

    def __call__(self, w, x):
        return {"y": jnp.tanh(self.scale * x @ w["w"] + w["b"]) @ w["v"]}


def test_a_second_call_compiles_nothing():
    compiled, traced = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: (compiled if name.endswith("compile_duration") else traced).append(
            name
        )
    )

    def run(seed, scale):
        parents = [jax.tree.map(lambda x, k=k: x * k, mlp_variables()) for k in (1, 2)]
        x = np.random.default_rng(seed).normal(size=(16, 3)).astype(np.float32)
        for method in ("weights", "both"):
            mj.align(
                jax.random.key(seed),
                Net(scale),
                parents,
                x,
                calibration=x,
                config=mj.AlignConfig(method=method),
            )

    try:
        run(0, 1.0)
        first = len(compiled)
        assert first
        run(1, 1.0)
        assert len(compiled) == first
        run(0, 2.0)  # another network, another program
        assert len(compiled) > first
    finally:
        jax.monitoring.clear_event_listeners()
