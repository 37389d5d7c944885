"""Two Equinox networks, trained on class-skewed halves of the digits, aligned and merged.

    python experiments/examples/equinox_network.py

megajax takes the arrays of a model as variables, and a function that puts them back into it.
"""

import equinox as eqx
import jax
import numpy as np
import optax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import megajax as mj


def build(seed):
    return eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(seed))


_, rest = eqx.partition(build(0), eqx.is_array)


def apply_fn(variables, x):
    return jax.vmap(eqx.combine(variables, rest))(x)


@jax.jit
def train(variables, x, y):
    def step(carry, _):
        gradient = jax.grad(lambda v: cross_entropy(apply_fn(v, x), y).mean())(carry[0])
        updates, moments = adam.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), moments), None

    adam = optax.adam(3e-3)
    return jax.lax.scan(step, (variables, adam.init(variables)), length=100)[0][0]


x, y = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
learn, choose, test = np.split(np.random.default_rng(0).permutation(len(y)), [1000, 1350])
rare = np.random.default_rng(1).random(len(learn)) < 0.05
homes = [learn[(y[learn] % 2 == odd) | rare] for odd in (0, 1)]

starts = [eqx.filter(build(seed), eqx.is_array) for seed in (0, 1)]
parents = [train(starts[k], x[homes[k]], y[homes[k]]) for k in (0, 1)]
result = mj.merge(
    jax.random.key(2),
    apply_fn,
    parents,
    (x[choose], y[choose]),
    calibration=x[learn],
    align=mj.AlignConfig(method="activations"),
)
for name, variables in zip(("parent 0", "parent 1", "merged"), [*parents, result.variables]):
    score = mj.measure(mj.predict(apply_fn, variables, x[test]), y[test])
    print(f"{name}: {score.accuracy:.1%} of the test images")
merged = eqx.combine(result.variables, rest)  # an Equinox model again
assert merged(x[0]).shape == (10,)
