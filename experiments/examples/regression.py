"""Two regressions, on slim and on heavier patients of scikit-learn's diabetes data, merged.

    python experiments/examples/regression.py

Real targets of the outputs' shape ask for the mean squared error; R2 is reported beside it.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score

import megajax as mj


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))[:, 0]


@jax.jit
def train(variables, x, y):
    def step(carry, _):
        gradient = jax.grad(lambda v: ((MLP().apply(v, x) - y) ** 2).mean())(carry[0])
        updates, state = adam.update(gradient, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), None

    adam = optax.adamw(1e-2, weight_decay=0.3)
    return jax.lax.scan(step, (variables, adam.init(variables)), length=100)[0][0]


x, y = load_diabetes(return_X_y=True)
x, y = (((one - one.mean(axis=0)) / one.std(axis=0)).astype(np.float32) for one in (x, y))
learn, choose, test = np.split(np.random.default_rng(0).permutation(len(x)), [200, 310])
learn = learn[np.argsort(x[learn, 2])]  # by the body mass index

network = mj.from_linen(MLP(), MLP().init(jax.random.key(0), x[:1]))
starts = [MLP().init(jax.random.key(seed), x[:1]) for seed in (0, 1)]
slim, heavy = np.split(learn, 2)
parents = [train(starts[0], x[slim], y[slim]), train(starts[1], x[heavy], y[heavy])]
result = mj.merge(jax.random.key(2), network.apply_fn, parents, (x[choose], y[choose]))
print(f"metric: {result.metrics['task_0']}; on other patients:")
for name, variables in zip(("parent 0", "parent 1", "merged"), [*parents, result.variables]):
    outputs = mj.predict(network.apply_fn, variables, x[test])
    error, share = ((outputs - y[test]) ** 2).mean(), r2_score(y[test], outputs)
    print(f"{name}: mean squared error {error:.3f}, R2 {share:.3f}")
