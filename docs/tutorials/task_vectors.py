# %% [markdown]
# # Task vectors
#
# Two networks were fine-tuned from one base, each on a task of its own. What fine-tuning changed is
# a *task vector*, tau = theta - theta_0. Their scaled sum, added to the base, is often good at both
# tasks. megajax searches for the scales.
#
# ## A base and two fine-tunes
#
# The base reads digits. One fine-tune goes on with noisy images, the other with images shifted by a
# pixel.

# %%
import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import megajax as mj

model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
images, labels = load_digits(return_X_y=True)
images = np.float32(images / 16)
learn, choose, test = np.split(np.random.default_rng(0).permutation(len(labels)), [900, 1300])
noise = np.random.default_rng(1).normal(size=images.shape)
views = {
    "noisy": np.float32(images + 0.4 * noise),
    "shifted": np.roll(images.reshape(-1, 8, 8), 1, axis=2).reshape(-1, 64),
}


@jax.jit
def train(weights, x, y):
    optimizer = optax.adam(1e-3)

    def loss(weights):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(weights, x), y).mean()

    def step(_, carry):
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(0, 100, step, (weights, optimizer.init(weights)))[0]


base = train(model.init(jax.random.key(0), images[:1]), images[learn], labels[learn])
parents = [train(base, view[learn], labels[learn]) for view in views.values()]


def show(name, weights):
    logits = [mj.predict(model.apply, weights, view[test]) for view in views.values()]
    scores = [mj.measure(one, labels[test]).accuracy for one in logits]
    mean = sum(scores) / 2
    print(f"{name:16} noisy {scores[0]:.1%}   shifted {scores[1]:.1%}   mean {mean:.1%}")


show("base", base)
for number, parent in enumerate(parents):
    show(f"parent {number}", parent)

# %% [markdown]
# Each fine-tune is good at its own task, and worse than the base or hardly better at the other.
#
# ## What needs no search
#
# Task arithmetic takes one scale for all task vectors, chosen on validation; TIES first trims them
# and lets them vote on signs.

# %%
tasks = [mj.Task(view[choose], labels[choose], name=name) for name, view in views.items()]
baselines = mj.run_baselines(
    jax.random.key(0),
    model.apply,
    parents,
    tasks,
    base=base,
    config=mj.BaselinesConfig(names=("uniform_average", "task_arithmetic", "ties")),
)
for name, baseline in baselines.items():
    show(name, baseline.variables)

# %% [markdown]
# ## A search for scales
#
# With `kind="task_vectors"` a gene is a pair of scales: theta = theta_0 + c_0 tau_0 + c_1 tau_1.
# `granularity` says how many genes there are: one for the whole network, or one for each hidden
# unit.

# %%
results = {}
for granularity in ("global", "channel"):
    results[granularity] = mj.merge(
        jax.random.key(1),
        model.apply,
        parents,
        tasks,
        base=base,
        genome=mj.GenomeConfig(kind="task_vectors", granularity=granularity),
        evolution=mj.EvolutionConfig(population_size=24, generations=60),
    )
    genes = results[granularity].genome.num_genes
    show(f"{granularity} ({genes})", results[granularity].variables)

# %% [markdown]
# The scales themselves are in `genes`, `[G, K]`: one row for each gene, one column for each parent.
# Here they are for the whole network, and on average over the hidden units.

# %%
for name, result in results.items():
    scales = np.asarray(result.genes).mean(axis=0)
    print(f"{name}: {scales[0]:.2f} of the first task vector, {scales[1]:.2f} of the second")

# %% [markdown]
# Task vectors are in their base's order of hidden units, so nothing is aligned here. For parents
# *without* a common base, see [Your own model](own_model.md).
