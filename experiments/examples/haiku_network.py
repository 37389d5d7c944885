"""Two Haiku networks with BatchNorm, trained on class-skewed halves of the digits, merged.

    python experiments/examples/haiku_network.py

The pair of parameters and state is one pytree; BatchNorm's averages in it are measured anew.
"""

import haiku as hk
import jax
import numpy as np
import optax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import megajax as mj


@hk.without_apply_rng
@hk.transform_with_state
def model(x, training):
    for width in (64, 64):
        x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Linear(width)(x), training))
    return hk.Linear(10)(x)


def apply_fn(variables, x):
    return model.apply(*variables, x, training=False)[0]


@jax.jit
def train(variables, x, y):
    def loss(params, state):
        logits, state = model.apply(params, state, x, training=True)
        return cross_entropy(logits, y).mean(), state

    def step(carry, _):
        gradient, state = jax.grad(loss, has_aux=True)(*carry[:2])
        updates, moments = adam.update(gradient, carry[2])
        return (optax.apply_updates(carry[0], updates), state, moments), None

    adam = optax.adam(3e-3)
    return jax.lax.scan(step, (*variables, adam.init(variables[0])), length=100)[0][:2]


x, y = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
learn, choose, test = np.split(np.random.default_rng(0).permutation(len(y)), [1000, 1350])
rare = np.random.default_rng(1).random(len(learn)) < 0.05
homes = [learn[(y[learn] % 2 == odd) | rare] for odd in (0, 1)]
starts = [model.init(jax.random.key(seed), x[:2], True) for seed in (0, 1)]
parents = [train(starts[k], x[homes[k]], y[homes[k]]) for k in (0, 1)]
result = mj.merge(
    *(jax.random.key(2), apply_fn, parents, (x[choose], y[choose])),
    calibration=x[learn],
    align=mj.AlignConfig(method="activations"),
    recalibrate=mj.RecalibrateConfig(enabled=True),
)
for name, variables in zip(("parent 0", "parent 1", "merged"), [*parents, result.variables]):
    score = mj.measure(mj.predict(apply_fn, variables, x[test]), y[test])
    print(f"{name}: {score.accuracy:.1%} of the test images")
