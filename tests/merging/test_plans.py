"""Plans: what `auto` chooses, and what a network takes of the memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.config import FitnessConfig
from megajax.errors import DeviceError
from megajax.merging import plans
from megajax.merging.fitness import accuracy, batches, evaluator
from megajax.merging.genome import masks, recalibrated
from megajax.merging.plans import (
    Memory,
    Plan,
    check_memory,
    footprint,
    plan_evaluation,
    predict_memory,
    trial,
)
from megajax.trees import stacked_shapes
from megajax.zoo.networks import build

IMAGES = jax.ShapeDtypeStruct((1000, 32, 32, 3), jnp.float32)


class Net(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3))(x)).mean((1, 2)) if self.width else x[:, 0, 0]
        return nn.Dense(4)(x)


def plan(net, **options):
    variables = jax.eval_shape(net.init, jax.random.key(0), IMAGES)
    return plan_evaluation(jax.jit(net.apply), variables, IMAGES, FitnessConfig(**options), 20)


def test_auto_goes_one_by_one_on_a_cpu_and_side_by_side_elsewhere(monkeypatch):
    assert plan(Net()).population_chunk == plan(Net(width=0)).population_chunk == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert plan(Net()) == (20, 512, None)


def test_elsewhere_auto_takes_as_many_as_half_the_memory_holds(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    few = jax.ShapeDtypeStruct((512, *IMAGES.shape[1:]), IMAGES.dtype)
    net = Net()
    one = footprint(net.apply, jax.eval_shape(net.init, jax.random.key(0), few), few)
    monkeypatch.setattr(plans, "free_memory", lambda: 2 * 7 * one + one)
    assert plan(net).population_chunk == 7
    monkeypatch.setattr(plans, "free_memory", lambda: one)
    assert plan(net).population_chunk == 1


@pytest.mark.parametrize(("width", "fits"), [(1, 512), (8, 122), (16, 61), (1024, 32)])
def test_a_pass_through_convolutions_has_what_fits_in_the_caches(width, fits):
    # Four arrays of the convolution's size are alive at once, 4 kB for each channel.
    assert plan(Net(width)).batch_size == pytest.approx(fits, rel=0.05)


def test_what_the_configuration_says_counts():
    assert plan(Net(), population_chunk=5, batch_size=7) == (5, 7, None)


def test_a_footprint_is_the_weights_and_what_is_alive_at_once():
    def apply_fn(w, x):
        for _ in range(5):  # two of them are alive at a time, inside a call as outside
            x = jnp.tanh(x)
        return jax.jit(lambda x: jnp.exp(jnp.tanh(x)) @ w)(x)

    weights, inputs = jnp.zeros((8, 4)), jnp.zeros((16, 8))
    # In the call: its argument, and exp(tanh(x)) while the product is made.
    expected = 4 * (8 * 4 + 2 * 16 * 8) + 4 * max(16 * 8, 16 * 4) + 4 * 16 * 4
    assert footprint(apply_fn, weights, inputs) == expected


def slow_pass(steps):
    """A network whose pass takes so many steps, whatever the number of examples and networks."""

    def apply_fn(w, x):
        return x + jax.lax.fori_loop(0, steps, lambda _, w: jnp.sin(w), w)

    return apply_fn


def test_a_trial_finds_what_is_faster():
    inputs, w = jax.ShapeDtypeStruct((512, 1), jnp.float32), jnp.ones(1)
    candidates = [Plan(chunk, size) for chunk in (1, 16) for size in (32, 256)]
    assert trial(slow_pass(1000), w, inputs, candidates) == Plan(16, 256)

    @jax.custom_batching.custom_vmap
    def alone(w, x):
        return slow_pass(100)(w, x)

    @alone.def_vmap
    def together(axis_size, in_batched, w, x):
        return jax.vmap(slow_pass(100_000), (0, None))(w, x), True

    assert trial(alone, w, inputs, candidates) == Plan(1, 256)


@pytest.mark.slow
def test_a_trial_is_not_repeated_and_keeps_to_what_is_given(monkeypatch):
    tried = []
    real = plans._speeds
    monkeypatch.setattr(plans, "_speeds", lambda *a: tried.append(a[3]) or real(*a))
    dense = Net(width=0)
    first = plan(dense, trial=True)
    assert first == plan(dense, trial=True)
    assert len(tried) == 1
    assert {plan.batch_size for plan in tried[0]} == {32, 64, 128, 256, 512}
    assert {plan.population_chunk for plan in tried[0]} == {1, 2, 4, 8, 16, 20}
    assert plan(dense, trial=True, batch_size=64).batch_size == 64
    assert plan(dense, trial=True, population_chunk=3).population_chunk == 3


def test_what_does_not_fit_is_passed_over(monkeypatch):
    def apply_fn(w, x):
        if x.ndim == 2 and len(x) > 32:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return x @ w

    inputs, w = jax.ShapeDtypeStruct((512, 3), jnp.float32), jnp.ones((3, 2))
    assert trial(apply_fn, w, inputs, [Plan(1, 32), Plan(1, 64)]) == Plan(1, 32)
    with pytest.raises(DeviceError, match=r"fitness\.trial: none of 1 plans fits"):
        trial(apply_fn, w, inputs, [Plan(1, 64)])


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("mlp", {}, (32, 32, 3)),
        ("resnet", {"depth": 8}, (32, 32, 3)),
        ("densenet", {"blocks": (2, 2), "growth": 8, "stem": "cifar"}, (16, 16, 3)),
    ],
)
@pytest.mark.parametrize(("chunk", "anew"), [(1, True), (4, False)])
def test_the_memory_that_is_predicted_is_what_the_compiler_reserves(
    name, options, shape, chunk, anew
):
    model = build(name, 10, options)
    images = np.zeros((256, *shape), np.float32)
    one = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    parents = stacked_shapes(one, 2)

    def apply_fn(variables, x):
        return model.apply(variables, x)

    genome, context, calibration = masks(parents, granularity="leaf"), parents, None
    if anew and name != "mlp":
        calibration = jax.ShapeDtypeStruct((128, *shape), jnp.float32)
        genome, context = recalibrated(genome, apply_fn), (parents, calibration)
    genes = jax.eval_shape(lambda: genome.init(jax.random.key(0), 8))
    memory = predict_memory(
        apply_fn,
        one,
        images,
        jax.eval_shape(lambda genes: genes[0], genes),
        num_parents=2,
        batch_size=64,
        calibration=calibration,
    )
    data = batches(images, np.zeros(256, int), 64)
    evaluate = evaluator(genome.express, apply_fn, accuracy, context, data, population_chunk=chunk)
    compiled = jax.jit(lambda evaluate, genes: evaluate(genes)).lower(evaluate, genes).compile()
    told = compiled.memory_analysis()
    reserved = told.argument_size_in_bytes + told.temp_size_in_bytes
    assert 0.5 < memory.total(8, chunk) / reserved < 2.5


def test_too_little_memory_is_a_line_with_what_fits():
    memory = Memory(fixed=10, individual=3, network=20)
    check_memory(memory, 10, 10, 240)
    check_memory(memory, 10, 10, None)
    for free, line in {
        239: "population_chunk is 10: .* 9 networks fit side by side",
        60: "population_chunk is 10: .* 1 network fits side by side",
        59: "population_size is 10: .* a population of 9 fits",
        32: "scoring takes about .* for one network and its parents alone",
    }.items():
        with pytest.raises(DeviceError, match=line):
            check_memory(memory, 10, 10, free)
