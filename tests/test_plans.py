"""Plans: what `auto` chooses, and what a network takes of the memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from megajax.config import FitnessConfig
from megajax.plans import footprint, plan_evaluation

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


def test_auto_goes_one_by_one_through_convolutions_on_a_cpu_and_side_by_side_otherwise():
    assert plan(Net()).population_chunk == 1
    assert plan(Net(width=0)) == (20, 512, None)


@pytest.mark.parametrize(("width", "fits"), [(1, 512), (16, 162), (64, 40), (1024, 32)])
def test_a_pass_through_convolutions_has_what_fits_in_the_caches(width, fits):
    # The convolution's result, the biases at its size and their sum: 3 x 4 kB for each channel.
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
