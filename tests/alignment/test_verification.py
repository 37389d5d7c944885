"""Verification: no false alarm where rounding differs, and no blind spot where it must not."""

import alignment_networks as networks
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_symmetries import INPUTS, MLP_SITES, NETWORKS, mlp, mlp_variables

import megajax as mj
from megajax.alignment import Group, Symmetries, find_symmetries, verify
from megajax.errors import DataError, ParentsError, SymmetryError

KEY = jax.random.key(0)
RIGHT = Symmetries((Group("hidden", 8, MLP_SITES),))
WRONG = Symmetries((Group("hidden", 8, MLP_SITES[:2]),))  # forgets who reads the units


def around(function):
    return lambda variables, x: function(mlp(variables, x))


def caught(apply_fn, variables=None, inputs=INPUTS):
    """The right symmetries pass, and wrong ones do not."""
    variables = mlp_variables() if variables is None else variables
    verify(KEY, RIGHT, apply_fn, variables, inputs)
    with pytest.raises(SymmetryError, match="group 'hidden' changes the outputs by"):
        verify(KEY, WRONG, apply_fn, variables, inputs)


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y.at[:, 0].set(-jnp.inf),
        lambda y: y + jnp.array([-jnp.inf, 0]),
        lambda y: y + jnp.array([-1e9, 0]),
        lambda y: jnp.where(jnp.arange(2) == 1, -1e9, y),
        lambda y: jax.nn.log_softmax(y + jnp.array([-1e30, 0])) + y,
        lambda y: {"logits": y, "large": 1e6 * y, "small": (1e-6 * y, jnp.argmax(y, -1))},
        lambda y: {"large": 1e9 + 0 * y, "small": 1e-6 * y},
        lambda y: y + 1000,
    ],
)
def test_what_is_switched_off_or_large_neither_alarms_nor_blinds(after):
    caught(around(after))


def test_outputs_and_inputs_of_any_form():
    def apply_fn(variables, x):
        return {"y": mlp(variables, x["a"] + x["b"][0]), "nothing": None, "const": jnp.ones(3)}

    caught(apply_fn, inputs={"a": INPUTS, "b": [INPUTS]})


def half_networks():
    def transformer(dtype):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(16, dtype=dtype)(x)
                for _ in range(3):
                    y = nn.LayerNorm(dtype=dtype)(x)
                    x = x + nn.MultiHeadDotProductAttention(num_heads=4, dtype=dtype)(y)
                    y = nn.Dense(64, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))
                    x = x + nn.Dense(16, dtype=dtype)(nn.gelu(y))
                return nn.Dense(5, dtype=dtype)(x.mean(1))

        return networks.linen(Net(), (8, 6, 4))

    return transformer


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("weights", [False, True])
def test_networks_in_half_precision(dtype, weights):
    """They compute in it, or hold it too; permutations pass, and a forgotten leaf does not."""
    apply_fn, variables, inputs = half_networks()(dtype)
    if weights:
        variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
        inputs = inputs.astype(dtype)
    symmetries = find_symmetries(apply_fn, variables, inputs)
    for seed in range(3):
        verify(jax.random.key(seed), symmetries, apply_fn, variables, inputs)
    wide = next(group for group in symmetries.groups if group.size == 64)
    for forgotten in range(len(wide.sites)):
        sites = wide.sites[:forgotten] + wide.sites[forgotten + 1 :]
        with pytest.raises(SymmetryError, match="changes the outputs"):
            verify(KEY, Symmetries((wide._replace(sites=sites),)), apply_fn, variables, inputs)


def test_a_network_in_half_precision_is_aligned():
    apply_fn, variables, inputs = half_networks()(jnp.bfloat16)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    symmetries = find_symmetries(apply_fn, variables, inputs)
    drawn = mj.alignment.random_permutations(KEY, symmetries)
    planted = mj.alignment.permute(symmetries, drawn, variables)
    (_, back), _ = mj.align(KEY, apply_fn, [variables, planted], inputs)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_a_leaf_whose_spread_is_more_than_its_type_holds():
    variables = mlp_variables()
    large = jnp.array([-6e4, 6e4] * 4, jnp.float16)

    def apply_fn(variables, x):
        return mlp({**variables, "b": variables["b"].astype(jnp.float32) / 6e4}, x)

    caught(apply_fn, {**variables, "b": np.asarray(large)})


def test_what_gives_no_number_as_it_is_is_named():
    variables, bad = mlp_variables(), INPUTS.copy()
    bad[0, 1] = np.nan
    with pytest.raises(DataError, match="inputs: 1 of 12 values are not finite"):
        verify(KEY, RIGHT, mlp, variables, bad)
    with pytest.raises(DataError, match="inputs x: 1 of 12 values are not finite"):
        verify(KEY, RIGHT, lambda v, x: mlp(v, x["x"]), variables, {"x": bad})
    broken = {**variables, "b": np.full(8, np.nan, np.float32)}
    with pytest.raises(ParentsError, match="leaf b: 8 of 8 values are not finite"):
        verify(KEY, RIGHT, mlp, broken, INPUTS)
    with pytest.raises(DataError, match="the network's outputs are not a number"):
        verify(KEY, RIGHT, around(lambda y: jnp.log(-1 - jnp.abs(y))), variables, INPUTS)


def test_what_overflows_only_when_perturbed_is_compared_as_it_is():
    def apply_fn(variables, x):  # weights of 11 and more overflow float16, and cancel to NaN
        y = jnp.exp(jnp.abs(variables["w"]).max().astype(jnp.float16) + 9.5)
        return mlp(variables, x) + (y - y)

    variables = mlp_variables()
    variables["w"] = variables["w"] / np.abs(variables["w"]).max()
    verify(KEY, RIGHT, apply_fn, variables, INPUTS)


@pytest.mark.parametrize("name", ["resnet-20", "vision transformer", "lstm"])
def test_healthy_networks_are_far_from_the_tolerance(name):
    apply_fn, variables, inputs = NETWORKS[name][0]()
    symmetries = find_symmetries(apply_fn, variables, inputs)
    verify(KEY, symmetries, apply_fn, variables, inputs, tolerance=3e-5)
