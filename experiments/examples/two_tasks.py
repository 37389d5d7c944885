"""Two fine-tunes of one network, each on a task of its own, merged by task vectors.

    python experiments/examples/two_tasks.py

The base reads digits. One parent went on with noisy images of them, the other with images shifted
by a pixel. A gene is the pair of coefficients with which a hidden unit takes
what the parents have learnt: base + c_0 (parent_0 - base) + c_1 (parent_1 - base).
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
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


@jax.jit
def train(variables, x, y):
    def step(carry, _):
        gradient = jax.grad(lambda v: cross_entropy(MLP().apply(v, x), y).mean())(carry[0])
        updates, moments = adam.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), moments), None

    adam = optax.adam(1e-3)
    return jax.lax.scan(step, (variables, adam.init(variables)), length=100)[0][0]


images, labels = load_digits(return_X_y=True)
images = (images / 16).reshape(-1, 8, 8).astype(np.float32)
noise = np.random.default_rng(0).normal(size=images.shape).astype(np.float32)
views = {"noisy": images + 0.4 * noise, "shifted": np.roll(images, 1, axis=2)}
learn, choose, test = slice(1000), slice(1000, 1300), slice(1300, None)

network = mj.from_linen(MLP(), MLP().init(jax.random.key(0), images[:1]))
base = train(network.variables, images[learn], labels[learn])
parents = [train(base, view[learn], labels[learn]) for view in views.values()]
result = mj.merge(
    jax.random.key(1),
    network.apply_fn,
    parents,
    [mj.Task(view[choose], labels[choose], name=name) for name, view in views.items()],
    base=base,
    genome=mj.GenomeConfig(kind="task_vectors"),
)
mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *parents)
networks = {"base": base, "parent 0": parents[0], "parent 1": parents[1], "mean": mean}
for name, variables in {**networks, "merged": result.variables}.items():
    logits = [mj.predict(network.apply_fn, variables, view[test]) for view in views.values()]
    scores = [mj.measure(one, labels[test]).accuracy for one in logits]
    print(f"{name:8}  noisy {scores[0]:.1%}  shifted {scores[1]:.1%}")
