"""Adapters: the functional form computes what the live model computes, and equal ones are equal."""

import functools
import subprocess
import sys
import typing

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


@functools.partial(jax.jit, static_argnums=0)
def _called(graph, state, x):
    model = nnx.merge(graph, state)
    return model(x), nnx.state(model)


def call(model, x):
    """Flax 0.12.1's own `nnx.jit` does not work with JAX 0.10."""
    outputs, state = _called(*nnx.split(model), x)
    nnx.update(model, state)
    return outputs


@functools.cache
def _trained(seed):
    model = NnxNet(nnx.Rngs(seed))
    model.train()
    call(model, X + seed)
    return model


def trained_nnx(seed):
    """A model whose BatchNorm statistics are not those of the start."""
    return nnx.clone(_trained(seed))


def test_linen_variables_keep_their_structure_and_function():
    variables = jax.jit(LinenNet().init)(jax.random.key(0), X)
    network = mj.from_linen(LinenNet(), variables, train=False)
    assert jax.tree.structure(network.variables) == jax.tree.structure(variables)
    assert set(network.variables) == {"params", "batch_stats"}
    expected = jax.jit(LinenNet().apply)(variables, X)
    np.testing.assert_array_equal(jax.jit(network.apply_fn)(network.variables, X), expected)


def test_nnx_function_is_the_models_in_evaluation_mode_and_leaves_it_alone():
    model = trained_nnx(0)
    before = mj.from_nnx(model).variables
    network = mj.from_nnx(model)
    assert not model.norm.use_running_average  # still in training mode
    logits = jax.jit(network.apply_fn)(network.variables, X)
    chex.assert_trees_all_equal(mj.from_nnx(model).variables, before)
    model.eval()
    np.testing.assert_array_equal(logits, call(model, X))


def test_one_nnx_function_serves_every_model_of_the_architecture():
    first, second = trained_nnx(0), trained_nnx(1)
    network, other = mj.from_nnx(first), mj.from_nnx(second)
    second.eval()
    logits = jax.jit(network.apply_fn)(other.variables, X)
    np.testing.assert_allclose(logits, call(second, X), rtol=1e-5, atol=1e-6)
    both = network.variables, other.variables
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    both = jax.jit(jax.vmap(network.apply_fn, (0, None)))(stacked, X)
    np.testing.assert_allclose(both[1], logits, rtol=1e-4, atol=1e-5)


def test_to_nnx_is_the_way_back():
    first, second = trained_nnx(0), trained_nnx(1)
    copy = mj.to_nnx(first, mj.from_nnx(second).variables)
    copy.eval()
    second.eval()
    np.testing.assert_array_equal(call(copy, X), call(second, X))
    first.eval()
    assert not np.allclose(call(first, X), call(second, X))


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


# --- equality by value ---------------------------------------------------------------------------


class Configured(nn.Module):
    sizes: typing.Any = (4,)
    table: typing.Any = None
    activation: typing.Any = nn.relu
    traced: typing.ClassVar[list] = []

    @nn.compact
    def __call__(self, x, train=True, scale=None):
        self.traced.append(train)
        for size in self.sizes:
            x = self.activation(nn.Dense(size)(x))
        return {"outputs": x, "mean": (x.mean(-1),)}


class ConfiguredNnx(nnx.Module):
    traced: typing.ClassVar[list] = []

    def __init__(self, seed, size=4, **options):
        rngs = nnx.Rngs(0, noise=seed)
        self.dense, self.options = nnx.Linear(8, size, rngs=rngs), options
        self.noise = nnx.Dropout(0.5, rng_collection="noise", rngs=rngs)

    def __call__(self, x, double=False):
        self.traced.append(double)
        x = self.noise(self.dense(x))
        return {"outputs": 2 * x if double else x}


@functools.partial(jax.jit, static_argnums=0)
def outputs(apply_fn, variables, x):
    return apply_fn(variables, x)


def linen(sizes=(4,), table=None, activation=nn.relu, **inference):
    module = Configured(sizes, table, activation)
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}}
    return mj.from_linen(module, variables, **inference)


def live(seed=0, size=4, inference=(), **options):
    return mj.from_nnx(ConfiguredNnx(seed, size, **options), **dict(inference))


ALIKE = [
    (linen, {"train": False}),
    (linen, {"sizes": [4], "train": False}),
    (linen, {"sizes": [4], "table": {"a": [np.arange(3)]}}),
    (linen, {"table": Configured([1, 2])}),
    (linen, {"train": False, "scale": jnp.ones(2)}),
    (live, {}),
    (live, {"seed": 3, "inference": (("double", True),)}),
    (live, {"widths": {"a": 1}, "sizes": (1, 2)}),
]
DIFFERENT = [
    (linen, {"train": False}, {"train": True}),
    (linen, {"train": False}, {}),
    (linen, {"sizes": [4]}, {"sizes": [5]}),
    (linen, {"sizes": [4]}, {"sizes": [4, 4]}),
    (linen, {"table": np.arange(3)}, {"table": np.arange(3.0)}),
    (linen, {"table": np.arange(3)}, {"table": np.arange(1, 4)}),
    (linen, {"table": jax.random.key(0)}, {"table": jax.random.key(1)}),
    (linen, {"activation": nn.relu}, {"activation": nn.gelu}),
    (live, {}, {"size": 5}),
    (live, {}, {"seed": 1}),
    (live, {}, {"inference": (("double", True),)}),
    (live, {"widths": {"a": 1}}, {"widths": {"a": 2}}),
]


@pytest.mark.parametrize(("make", "arguments"), ALIKE)
def test_equal_models_have_equal_functions_and_share_what_is_compiled(make, arguments):
    traced = Configured.traced if make is linen else ConfiguredNnx.traced
    first, second = make(**arguments), make(**arguments)
    assert first.apply_fn is not second.apply_fn
    assert first.apply_fn == second.apply_fn
    assert hash(first.apply_fn) == hash(second.apply_fn)
    x = jnp.ones((2, 8))
    results = [outputs(first.apply_fn, first.variables, x)]
    traced.clear()
    results.append(outputs(second.apply_fn, second.variables, x))
    assert not traced
    chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize(("make", "one", "other"), DIFFERENT)
def test_other_models_have_other_functions(make, one, other):
    assert make(**one).apply_fn != make(**other).apply_fn


def test_outputs_are_whatever_the_model_returns():
    network = linen(train=False)
    found = network.apply_fn(network.variables, jnp.ones((2, 8)))
    assert found["outputs"].shape == (2, 4)
    np.testing.assert_array_equal(found["mean"][0], [9, 9])
    network = live(inference=(("double", True),))
    single = live(inference=()).apply_fn(network.variables, jnp.ones((2, 8)))["outputs"]
    double = network.apply_fn(network.variables, jnp.ones((2, 8)))["outputs"]
    np.testing.assert_array_equal(double, 2 * single)


# --- what NNX models are made of -----------------------------------------------------------------


class Mask(nnx.Variable):
    pass


class Everything(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.scales = nnx.List([nnx.Param(jnp.asarray(1 + 0.1 * i + seed)) for i in range(11)])
        self.dense = self.tied = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.mask = Mask(jnp.arange(8) % 2 == seed % 2)
        self.scale, self.step = nnx.Variable(jnp.asarray(2.0 + seed)), nnx.Variable(3)
        self.table = jnp.arange(8.0) + seed
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.key, self.own_key = nnx.Variable(jax.random.key(seed)), jax.random.key(seed)
        self.cache, self.seen = nnx.Cache(jnp.zeros(2)), nnx.Intermediate(jnp.zeros(2))

    def __call__(self, x):
        for power, scale in enumerate(self.scales):
            x = x + 0.1**power * scale[...]
        self.cache[...] = self.cache[...] + 1
        x = self.dropout(self.norm(self.tied(x)) * self.mask[...] * self.scale[...] + self.table)
        return x


def test_every_variable_is_one_of_the_network_but_for_random_state_and_caches():
    models = [Everything(seed) for seed in (0, 1)]
    networks = [mj.from_nnx(model) for model in models]
    assert set(networks[0].variables) == {
        "dense",
        "mask",
        "norm",
        "scale",
        "scales",
        "step",
        "table",
    }
    assert set(networks[0].variables["norm"]) == {"bias", "mean", "scale", "var"}
    x = jax.random.normal(jax.random.key(0), (3, 8))
    expected = []
    for model in models:
        model.eval()
        expected.append(call(model, x))
    for k in (0, 1):  # one function for both, as often as one likes
        for _ in range(2):
            found = jax.jit(networks[0].apply_fn)(networks[k].variables, x)
            np.testing.assert_allclose(found, expected[k], rtol=1e-5, atol=1e-5)
        back = mj.to_nnx(models[0], networks[k].variables)
        np.testing.assert_allclose(call(back, x), expected[k], rtol=1e-5, atol=1e-5)


def test_variables_that_came_from_a_file_have_the_same_places(tmp_path):
    model = Everything(0)
    network = mj.from_nnx(model)
    path = mj.save_network(tmp_path / "net.npz", network.variables)
    for loaded in (mj.load_network(path, model), mj.load_network(path)):  # 10 comes after 9
        np.testing.assert_array_equal(
            network.apply_fn(loaded, jnp.ones(8)), network.apply_fn(network.variables, jnp.ones(8))
        )


# --- other things than models --------------------------------------------------------------------

DENSE = nn.Dense(3)
LIVE = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
NETWORK = mj.Network(jnp.dot, {"w": jnp.ones(3)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mj.from_linen(nn.Dense, {}), "module must be a Linen module, not a class: make"),
        (lambda: mj.from_linen(LIVE, {}), r"not an NNX model: from_nnx\(model\) takes it"),
        (lambda: mj.from_linen(DENSE, DENSE), "variables must be a pytree of arrays, not a Linen"),
        (lambda: mj.from_linen(DENSE, NETWORK), "not a Network: take its variables"),
        (
            lambda: mj.from_linen({}, DENSE),
            "module must be a Linen module, not a pytree of arrays$",
        ),
        (lambda: mj.from_nnx(nnx.Linear), "model must be an NNX model, not a class: make"),
        (lambda: mj.from_nnx(DENSE), r"not a Linen module: from_linen\(module, variables\) takes"),
        (lambda: mj.from_nnx(nnx.state(LIVE)), "model must be an NNX model, not a pytree of arr"),
        (lambda: mj.to_nnx(nnx.Linear, {}), "model must be an NNX model, not a class"),
        (lambda: mj.to_nnx(LIVE, {"kernel": 1}), "the variables lack bias, unlike the model"),
        (lambda: mj.to_nnx(LIVE, {"kernel": 1, "b": 2, "bias": 1}), "the variables have b, unlike"),
        (lambda: mj.from_nnx(LIVE).apply_fn({"kernel": 1}, 1), "the variables lack bias"),
        (lambda: mj.save_network("a.npz", LIVE), "variables must be .* not an NNX model"),
        (lambda: mj.save_network("a.npz", NETWORK), "variables must be .* not a Network"),
        (lambda: mj.save_network("a.npz", nn.Dense), "variables must be .* not a class"),
        (
            lambda: mj.load_network("a.npz", nn.Dense),
            "like must be a pytree of arrays, not a class",
        ),
        (lambda: mj.load_network("a.npz", DENSE), "like is a Linen module: inputs= must be"),
    ],
)
def test_another_form_of_argument_is_one_clear_line(call, message):
    with pytest.raises(mj.InterchangeError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_importing_megajax_does_not_load_nnx():
    code = "import sys, megajax; print('flax.nnx' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
