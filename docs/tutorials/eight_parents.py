# %% [markdown]
# # Eight parents
#
# More parents know more, and are harder to merge. Here eight small networks each know four of the
# ten digits. They can be merged in one search over eight coefficients a gene, or two by two in a
# tree: 8 → 4 → 2 → 1.
#
# ## The parents
#
# All eight are trained at once by `vmap`, from eight different starts.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import megajax as mj

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
x, y = load_digits(return_X_y=True)
x = np.float32(x / 16)
train, validation, test = np.split(np.random.default_rng(0).permutation(len(x)), [900, 1350])


@jax.jit
@jax.vmap
def trained(key, first):
    """A network that only sees the digits first, first + 1, first + 2 and first + 3."""
    optimizer, weights = optax.adam(2e-3), model.init(key, x[:1])
    seen = (jnp.asarray(y[train]) - first) % 10 < 4

    def loss(weights):
        logits = model.apply(weights, x[train])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[train])
        return jnp.where(seen, losses, 0).sum() / seen.sum()

    def step(_, carry):
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(0, 150, step, (weights, optimizer.init(weights)))[0]


stacked = trained(jax.random.split(jax.random.key(0), 8), jnp.arange(8))
parents = [jax.tree.map(lambda leaf, k=k: leaf[k], stacked) for k in range(8)]


def accuracy(weights):
    return mj.measure(mj.predict(model.apply, weights, x[test]), y[test]).accuracy


print("parents:", ", ".join(f"{accuracy(parent):.0%}" for parent in parents))

# %% [markdown]
# ## One search, or a tree
#
# Both may score 2,000 networks. `evaluation_budget` is shared out among the seven nodes of the
# tree, so the comparison is fair.

# %%
options = {
    "calibration": x[train],
    "align": "activations",
    "evolution": mj.EvolutionConfig(
        population_size=24, generations=1_000, evaluation_budget=2_000, generations_per_chunk=10
    ),
}
data = x[validation], y[validation]
at_once = mj.merge(jax.random.key(1), model.apply, parents, data, **options)
print(f"one search: {accuracy(at_once.variables):.1%} after {at_once.evaluations} networks")

tree = mj.merge_tree(jax.random.key(1), model.apply, parents, data, **options)
print(f"tree:       {accuracy(tree.variables):.1%} after {tree.evaluations} networks")
for node, found in zip(tree.nodes, tree.results, strict=True):
    met = " + ".join(map(str, node.parents))
    print(f"  round {node.round}: {met} -> {node.number}: {accuracy(found.variables):.1%}")

# %% [markdown]
# A node of the tree has a seventh of the budget, and what an early round loses, no later one can
# bring back. So the tree is not a way to get more out of a budget; it is for parents too many to
# hold in memory at once, and it is what MeGA does. `HierarchyConfig(pairing="similarity")` pairs
# the networks whose aligned weights are most alike, instead of neighbours.
#
# ## The cheap ways

# %%
mean = jax.tree.map(lambda *leaves: sum(leaves) / 8, *at_once.parents)
print(f"average of the aligned parents: {accuracy(mean):.1%}")

baselines = mj.run_baselines(
    jax.random.key(2),
    model.apply,
    at_once.parents,
    data,
    calibration=x[train],
    config=mj.BaselinesConfig(names=("regmean", "pleas")),
)
for name, baseline in baselines.items():
    print(f"{name}: {accuracy(baseline.variables):.1%}")

# %% [markdown]
# ## By gradients
#
# Eight coefficients for each of many genes are a large space for mutation and crossover. Where the
# metric has a gradient, following it takes fewer passes. The score is the loss on the validation
# labels, or, without labels, the distance to the parents' mean prediction on the training images.

# %%
ways = {"with labels": data, "without labels": mj.Task(x[train], metric="distill")}
for name, task in ways.items():
    options["evolution"] = mj.EvolutionConfig(
        method="gradient", generations=150, generations_per_chunk=50
    )
    found = mj.merge(jax.random.key(1), model.apply, parents, task, **options)
    print(f"gradient {name}: {accuracy(found.variables):.1%}")

# %% [markdown]
# And the ensemble of all eight, at eight times the cost of one network. It takes the mean of their
# predictions, half of which or more come from networks that have never seen the digit, so a search
# with labels can do better.

# %%
logits = np.stack([mj.predict(model.apply, parent, x[test]) for parent in parents])
print(f"ensemble: {mj.measure(mj.ensemble(logits), y[test]).accuracy:.1%}")
