"""The best compromises between two tasks, by NSGA-II: many merged networks from one search.

    python experiments/examples/front.py

One parent saw mostly even digits, the other mostly odd ones. No network of the front is as good as
another on both tasks and better on one.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import megajax as mj


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(nn.relu(nn.Dense(64)(x)))))


@jax.jit
def train(variables, x, y):
    def step(carry, _):
        gradient = jax.grad(lambda v: cross_entropy(MLP().apply(v, x), y).mean())(carry[0])
        updates, moments = adam.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), moments), None

    adam = optax.adam(3e-3)
    return jax.lax.scan(step, (variables, adam.init(variables)), length=100)[0][0]


x, y = load_digits(return_X_y=True)
x = (x / 16).astype(np.float32)
learn, choose, test = np.split(np.random.default_rng(0).permutation(len(y)), [1000, 1350])
homes = [learn[(y[learn] % 2 == odd) | (learn < 60)] for odd in (0, 1)]
halves = [[part[y[part] % 2 == odd] for odd in (0, 1)] for part in (choose, test)]

network = mj.from_linen(MLP(), MLP().init(jax.random.key(0), x[:1]))
parents = [train(network.variables, x[home], y[home]) for home in homes]
result = mj.merge(
    jax.random.key(1),
    network.apply_fn,
    parents,
    [mj.Task(x[i], y[i], name=name) for i, name in zip(halves[0], ("even", "odd"), strict=True)],
    evolution=mj.EvolutionConfig(method="nsga2", population_size=24, generations=40),
)
print(f"{len(result.front.scores)} networks on the front; accuracy on the test images:")
for number in range(0, len(result.front.scores), 4):
    variables = result.front.network(number)
    scores = [
        mj.measure(mj.predict(network.apply_fn, variables, x[i]), y[i]).accuracy for i in halves[1]
    ]
    print(f"network {number:2}  even {scores[0]:.1%}  odd {scores[1]:.1%}")
