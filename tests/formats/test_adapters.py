"""Adapters: the functional form computes what the live model computes."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import megajax as mj

X = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.List([nnx.Linear(4, 3, rngs=rngs)])

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head[0](self.dropout(x.mean((1, 2))))


def trained_nnx(seed):
    """A model whose BatchNorm statistics are not those of the start."""
    model = NnxNet(nnx.Rngs(seed))
    model.train()
    model(X + seed)
    return model


def test_linen_variables_keep_their_structure_and_function():
    variables = LinenNet().init(jax.random.key(0), X, train=True)
    network = mj.from_linen(LinenNet(), variables, train=False)
    assert jax.tree.structure(network.variables) == jax.tree.structure(variables)
    assert set(network.variables) == {"params", "batch_stats"}
    expected = LinenNet().apply(variables, X, train=False)
    np.testing.assert_array_equal(network.apply_fn(network.variables, X), expected)


def test_nnx_function_is_the_models_in_evaluation_mode_and_leaves_it_alone():
    model = trained_nnx(0)
    before = mj.from_nnx(model).variables
    network = mj.from_nnx(model)
    assert not model.norm.use_running_average  # still in training mode
    logits = network.apply_fn(network.variables, X)
    chex.assert_trees_all_equal(mj.from_nnx(model).variables, before)
    model.eval()
    np.testing.assert_array_equal(logits, model(X))


def test_one_nnx_function_serves_every_model_of_the_architecture():
    first, second = trained_nnx(0), trained_nnx(1)
    network, other = mj.from_nnx(first), mj.from_nnx(second)
    second.eval()
    logits = jax.jit(network.apply_fn)(other.variables, X)
    np.testing.assert_allclose(logits, second(X), rtol=1e-5, atol=1e-6)
    stacked = mj.stack_parents([network.variables, other.variables])
    both = jax.vmap(network.apply_fn, (0, None))(stacked, X)
    np.testing.assert_allclose(both[1], second(X), rtol=1e-4, atol=1e-5)


def test_to_nnx_is_the_way_back():
    first, second = trained_nnx(0), trained_nnx(1)
    copy = mj.to_nnx(first, mj.from_nnx(second).variables)
    copy.eval()
    second.eval()
    np.testing.assert_array_equal(copy(X), second(X))
    first.eval()
    assert not np.allclose(first(X), second(X))


def test_boxed_linen_variables_are_unboxed():
    model = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out")))
    variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    network = mj.from_linen(model, variables)
    assert isinstance(network.variables["params"]["kernel"], jax.Array)


def test_a_model_that_counts_its_random_numbers_can_be_compiled_and_is_left_alone():
    model = nnx.bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)).lazy_init(X)  # draws at every call
    network = mj.from_nnx(model)
    expected = X @ model.kernel[...] + model.bias[...]
    for _ in range(2):
        logits = jax.jit(network.apply_fn)(network.variables, X)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
