# %% [markdown]
# # Niches and Pareto fronts
#
# Most searches return one network. Two keep more than that: *niches* keep networks that are right
# about different examples, a *Pareto front* keeps the best compromises between tasks.
#
# ## Two parents that know different digits

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import megajax as mj

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
x, y = load_digits(return_X_y=True)
x = np.float32(x / 16)
train, validation, test = np.split(np.random.default_rng(0).permutation(len(x)), [900, 1350])


def trained(seed, rows):
    optimizer, weights = optax.adam(2e-3), model.init(jax.random.key(seed), x[:1])

    def loss(weights):
        logits = model.apply(weights, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(_, carry):
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(0, 150, step, (weights, optimizer.init(weights)))[0]


def accuracy(weights, rows):
    return mj.measure(mj.predict(model.apply, weights, x[rows]), y[rows]).accuracy


parents = [trained(k, train[(y[train] % 2 == k) | (train < 40)]) for k in (0, 1)]
even, odd = (test[y[test] % 2 == k] for k in (0, 1))
for number, parent in enumerate(parents):
    print(f"parent {number}: even {accuracy(parent, even):.1%}, odd {accuracy(parent, odd):.1%}")

# %% [markdown]
# ## Niches
#
# In M2N2's search an example is worth less the more members of the population are right about it.
# Whoever masters rare examples survives, and is paired with those who are right where it is wrong.
# Compare with the plain genetic algorithm at the same cost.

# %%
data = x[validation], y[validation]
for method in ("genetic", "niches"):
    result = mj.merge(
        jax.random.key(1),
        model.apply,
        parents,
        data,
        fitness=mj.FitnessConfig(metric="accuracy"),
        evolution=mj.EvolutionConfig(method=method, population_size=32, generations=60),
    )
    spread = np.asarray(result.state.population.genes).std(axis=0).mean()
    print(f"{method}: {accuracy(result.variables, test):.1%}, spread of the genes {spread:.3f}")

# %% [markdown]
# Niches keep the population apart for longer. That costs time on a small problem, and pays when a
# search gets stuck. M2N2 as published (whole networks, an archive, split points) is `mj.merge(...,
# **m2n2())` with `from megajax.merging.presets import m2n2`.
#
# ## A Pareto front
#
# Give the two halves as two tasks, and NSGA-II looks for networks of which none is as good as
# another on both and better on one.

# %%
halves = [validation[y[validation] % 2 == k] for k in (0, 1)]
tasks = [
    mj.Task(x[rows], y[rows], name=name) for rows, name in zip(halves, ("even", "odd"), strict=True)
]
result = mj.merge(
    jax.random.key(1),
    model.apply,
    parents,
    tasks,
    evolution=mj.EvolutionConfig(
        method="nsga2", population_size=32, generations=60, generations_per_chunk=10
    ),
)
front = [result.front.network(number) for number in range(len(result.front.scores))]
print(f"{len(front)} networks on the front")

# %%
figure, axes = plt.subplots(figsize=(6, 4.5))
for label, networks, mark in (("front", front, "o"), ("parents", parents, "D")):
    points = [(accuracy(one, even), accuracy(one, odd)) for one in networks]
    axes.plot(*(100 * np.array(points).T), mark, label=label)
chosen = 100 * accuracy(result.variables, even), 100 * accuracy(result.variables, odd)
axes.plot(*chosen, "*", markersize=16, label="result.variables")
axes.set(xlabel="test accuracy on even digits (%)", ylabel="on odd digits (%)")
axes.legend()
figure.tight_layout()

# %% [markdown]
# `result.variables` is the one with the best weighted fitness; `Task(weight=...)` moves it along
# the front. The points are test accuracies, while the front was chosen by validation loss, so some
# of them are beaten by others here.
