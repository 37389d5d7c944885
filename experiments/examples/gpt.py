"""Two small GPTs, trained on different packages of Python's own library, merged by their loss.

    python experiments/examples/gpt.py

Targets are the next characters `[N, T]`; the metric is then the negative cross-entropy of each.
"""

import asyncio
import email
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy

import megajax as mj


class GPT(nn.Module):
    @nn.compact
    def __call__(self, text):  # [b, T] -> logits [b, T, 128]
        x = nn.Embed(128, 32)(text) + nn.Embed(32, 32)(np.arange(32))
        mask = nn.make_causal_mask(text)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(32)(nn.gelu(nn.Dense(128)(nn.LayerNorm()(x))))
        return nn.Dense(128)(nn.LayerNorm()(x))


def texts(package):  # pieces of its files, [N, T + 1]
    code = b"".join(path.read_bytes() for path in sorted(Path(package.__path__[0]).glob("*.py")))
    letters = np.frombuffer(code[: 6800 * 33], np.uint8) % 128
    return np.random.default_rng(0).permutation(letters.reshape(-1, 33))


@jax.jit
def train(variables, batches):  # [steps, b, T + 1]
    def step(carry, text):
        x, y = text[:, :-1], text[:, 1:]
        gradient = jax.grad(lambda v: cross_entropy(GPT().apply(v, x), y).mean())(carry[0])
        updates, moments = adam.update(gradient, carry[1])
        return (optax.apply_updates(carry[0], updates), moments), None

    adam = optax.adam(3e-3)
    return jax.lax.scan(step, (variables, adam.init(variables)), batches)[0][0]


one, two = texts(asyncio), texts(email)
batches = [text[400:].reshape(200, 32, -1) for text in (one, two)]
network = mj.from_linen(GPT(), GPT().init(jax.random.key(0), one[:1, :-1]))
base = train(network.variables, np.concatenate(batches)[::2])
parents = [train(base, batch) for batch in batches]
validation, test = (np.concatenate([one[k:400:4], two[k:400:4]]) for k in (0, 1))
task = mj.Task(validation[:, :-1], validation[:, 1:])
small = mj.EvolutionConfig(population_size=12, generations=10)
result = mj.merge(jax.random.key(1), network.apply_fn, parents, task, evolution=small)
for name, variables in zip(("parent 0", "parent 1", "merged"), [*parents, result.variables]):
    loss = cross_entropy(mj.predict(network.apply_fn, variables, test[:, :-1]), test[:, 1:]).mean()
    print(f"{name}: {loss:.3f} nats for a character of new texts")
