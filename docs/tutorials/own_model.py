# %% [markdown]
# # Your own model
#
# You have two trained networks of your own design, and want one. This page goes the whole way with
# a network that megajax has never seen: two branches, one of which is added to itself.
#
# ## Two parents
#
# A network is a function `apply_fn(variables, inputs) -> outputs`; its variables are any pytree of
# arrays. Here both come from Flax, but nothing below depends on that.

# %%
import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

import megajax as mj


class Branches(nn.Module):
    """A branch with a skip connection beside a gated one."""

    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Dense(48, name="skip")(x))
        skip = skip + nn.relu(nn.Dense(48, name="inner")(skip))
        gated = nn.tanh(nn.Dense(32, name="value")(x)) * nn.sigmoid(nn.Dense(32, name="gate")(x))
        return nn.Dense(10, name="head")(skip) + nn.Dense(10, name="side")(gated)


model = Branches()
x, y = load_digits(return_X_y=True)
x = np.float32(x / 16)
train, validation, test = np.split(np.random.default_rng(0).permutation(len(x)), [900, 1350])

# %% [markdown]
# One parent sees the digits 0 to 5, the other 4 to 9, each from its own random start.


# %%
def trained(seed, rows):
    optimizer, weights = optax.adam(2e-3), model.init(jax.random.key(seed), x[:1])

    def loss(weights):
        logits = model.apply(weights, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(_, carry):
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], updates), state

    return jax.lax.fori_loop(0, 200, step, (weights, optimizer.init(weights)))[0]


def accuracy(weights):
    """On the test images, which nothing else on this page looks at."""
    return mj.measure(mj.predict(model.apply, weights, x[test]), y[test]).accuracy


parents = [trained(0, train[y[train] < 6]), trained(1, train[y[train] > 3])]
for number, parent in enumerate(parents):
    print(f"parent {number}: {accuracy(parent):.1%}")

# %% [markdown]
# ## What megajax sees in it
#
# Hidden units have no fixed order: permute them, together with every weight that reads them, and
# the function is the same. `find_symmetries` reads these groups from the program of the network.

# %%
print(mj.find_symmetries(model.apply, parents[0], x[:8]).describe())

# %% [markdown]
# The units of `skip` and `inner` move together, because they are added to each other, and so do
# those of `value` and `gate`, because they are multiplied. Nobody had to say so.
#
# ## Do the two fit together?

# %%
data = x[validation], y[validation]
print(mj.diagnose(jax.random.key(0), model.apply, parents, data, calibration=x[train]))

# %% [markdown]
# Each parent misses a part of the digits, the two together (the ensemble) know them all, and their
# average is far from it. The last line says what to try.
#
# ## Merge
#
# Distilling means to search towards what the parents predict on average, on inputs without labels;
# the training images will do. But here are 450 validation images *with* labels, too, so try both.
# The parents are aligned by their activations first, and each hidden unit gets mixing coefficients
# of its own.

# %%
results = {}
for name, task in {
    "without labels": mj.Task(x[train], metric="distill"),
    "with labels": data,
}.items():
    results[name] = mj.merge(
        jax.random.key(0),
        model.apply,
        parents,
        task,
        calibration=x[train],
        align="activations",
        evolution=mj.EvolutionConfig(method="gradient", generations=300, generations_per_chunk=50),
    )
    print(f"merged {name}: {accuracy(results[name].variables):.1%}")
result = results["with labels"]

# %% [markdown]
# ## And without a search?
#
# A merge is worth its search only if it beats the methods that need none. Here are three of them,
# on the same aligned parents.

# %%
baselines = mj.run_baselines(
    jax.random.key(1),
    model.apply,
    result.parents,
    data,
    calibration=x[train],
    config=mj.BaselinesConfig(names=("uniform_average", "regmean", "pleas")),
)
for name, baseline in baselines.items():
    print(f"{name}: {accuracy(baseline.variables):.1%}")

# %% [markdown]
# Choose between them by the validation score, not by the figures above: those are test figures, and
# a choice made by them would no longer be honest.
#
# ## Keep it

# %%
mj.save_network("merged.msgpack", result.variables)
again = mj.load_network("merged.msgpack", like=model, inputs=x[:1])
print(f"loaded again: {accuracy(again):.1%}")
