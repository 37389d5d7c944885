"""Two networks that label every pixel, merged by the cross-entropy of the pixels.

    python experiments/examples/segmentation.py

A pixel is background or part of a 0, 1, 2 or 3; one parent has seen few 2 and 3, one few 0 and 1.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score

import megajax as mj


class Pixels(nn.Module):
    @nn.compact
    def __call__(self, x):  # [b, 10, 19, 1] -> logits [b, 10, 19, 5]
        for stretch in (1, 1, 2, 2):
            x = nn.relu(nn.Conv(16, (3, 3), kernel_dilation=stretch)(x))
        return nn.Dense(5)(x)


def scenes(rng, count, shares):  # images [N, 10, 19, 1] of two digits, labels [N, 10, 19]
    digits, classes = load_digits(n_class=4, return_X_y=True)
    chance = np.take(shares, classes)
    images, labels = np.zeros((count, 10, 19, 1), np.float32), np.zeros((count, 10, 19), np.int32)
    for n, pair in enumerate(rng.choice(len(digits), (count, 2), p=chance / chance.sum())):
        for left, chosen in zip((rng.integers(2), 9 + rng.integers(2)), pair):
            place = np.s_[n, 1:9, left : left + 8]
            images[place] = digits[chosen].reshape(8, 8, 1) / 16
            labels[place] = (images[place][..., 0] > 0.3) * (classes[chosen] + 1)
    return images, labels


@jax.jit
def train(variables, batches):
    def step(carry, batch):
        gradient = jax.grad(lambda v, x, y: cross_entropy(Pixels().apply(v, x), y).mean())
        updates, moments = adam.update(gradient(carry[0], *batch), carry[1])
        return (optax.apply_updates(carry[0], updates), moments), None

    adam = optax.adam(5e-3)
    return jax.lax.scan(step, (variables, adam.init(variables)), batches)[0][0]


rng = np.random.default_rng(0)
learn = [scenes(rng, 1280, shares) for shares in ((9, 9, 1, 1), (1, 1, 9, 9))]
validation, test = scenes(rng, 100, (1, 1, 1, 1)), scenes(rng, 200, (1, 1, 1, 1))
network = mj.from_linen(Pixels(), Pixels().init(jax.random.key(0), test[0]))
batches = [[one.reshape(80, 16, *one.shape[1:]) for one in data] for data in learn]
parents = [train(network.variables, batch) for batch in batches]
small = mj.EvolutionConfig(population_size=12, generations=10)
result = mj.merge(jax.random.key(1), network.apply_fn, parents, validation, evolution=small)
for name, variables in zip(("parent 0", "parent 1", "merged"), [*parents, result.variables]):
    found = mj.predict(network.apply_fn, variables, test[0]).argmax(axis=-1)
    print(f"{name}: macro F1 {f1_score(test[1].ravel(), found.ravel(), average='macro'):.3f}")
