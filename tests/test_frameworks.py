"""Networks of other libraries: their symmetries are found, and they merge to a better network.

Both parents come from one base and go on with data of their own; then all hidden units of one are
shuffled, so that nothing but the alignment makes the two fit together.
"""

import asyncio
import collections
import email
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import optax
import pytest
from optax.losses import softmax_cross_entropy_with_integer_labels as cross_entropy
from sklearn.datasets import load_digits

import megajax as mj
from megajax.alignment import permute, random_permutations, verify
from megajax.trees import leaves_by_path

pytestmark = pytest.mark.slow

D, HEADS, MLP, LAYERS = 32, 4, 64, 2
SIZES = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "initializer_range": 0.1,  # the default is for layers 24 times wider
}
TRANSFORMER = [D, *LAYERS * [HEADS, D // HEADS, D // HEADS, MLP]]
"""Sizes of a transformer's groups: the residual stream, and for each layer the attention heads, a
head's pairs of query and key, its values, and the units of the block."""


class Case(NamedTuple):
    """A network, its first weights, the sizes of its groups of hidden units, and its data."""

    apply_fn: Any
    start: Any
    groups: list[int]
    homes: list[Any]  # inputs and targets of each parent
    choose: Any
    test: Any
    sections: dict[str, Any] = {}  # noqa: RUF012
    loss: Any = None  # of a network that has state: (params, state, x, y) -> (loss, new state)


def digits(*shape, tokens=False):
    """scikit-learn's digits: a home of even ones, a home of odd ones, and two parts of all."""
    x, y = load_digits(return_X_y=True)
    if tokens:  # 4 x 4 of them, each the mean of four pixels
        x = x.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).astype(np.int32)
    else:
        x = (x / 16).astype(np.float32)
    x = x.reshape(len(x), *shape)
    learn, choose, test = np.split(np.random.default_rng(0).permutation(len(y)), [1000, 1350])
    rare = np.random.default_rng(1).random(len(learn)) < 0.05
    homes = [learn[(y[learn] % 2 == odd) | rare] for odd in (0, 1)]
    return [(x[home], y[home]) for home in homes], (x[choose], y[choose]), (x[test], y[test])


def texts(length):
    """The next letters in two packages of Python's own library: a home of each, two of both."""
    homes, rest = [], []
    for package in (asyncio, email):
        files = sorted(Path(package.__path__[0]).glob("*.py"))
        code = b"".join(path.read_bytes() for path in files)[: 1600 * (length + 1)]
        pieces = np.frombuffer(code, np.uint8).astype(np.int32).reshape(-1, length + 1) % 128
        pieces = np.random.default_rng(0).permutation(pieces)
        homes.append((pieces[400:, :-1], pieces[400:, 1:]))
        rest.append(pieces[:400])
    both = [np.concatenate([one[part] for one in rest]) for part in (slice(100), slice(100, 400))]
    return homes, *((part[:, :-1], part[:, 1:]) for part in both)


def hugging_face():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def of_hugging_face(model, data, groups):
    """A Flax model of Hugging Face, called as its users call it."""
    start = jax.jit(model.init_weights, static_argnums=1)(jax.random.key(0), model.input_shape)
    return Case(lambda v, x: model(x, params=v).logits, start, groups, *data)


def bert():
    hf = hugging_face()
    config = hf.BertConfig(vocab_size=17, max_position_embeddings=16, num_labels=10, **SIZES)
    model = hf.FlaxBertForSequenceClassification(config, (1, 16), _do_init=False)
    return of_hugging_face(model, digits(16, tokens=True), [*TRANSFORMER, D])  # and the pooler


def vit():
    hf = hugging_face()
    config = hf.ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES)
    model = hf.FlaxViTForImageClassification(config, (1, 8, 8, 1), _do_init=False)
    return of_hugging_face(model, digits(1, 8, 8), TRANSFORMER)


def gpt2():
    hf = hugging_face()
    sizes = {"n_embd": D, "n_layer": LAYERS, "n_head": HEADS, "n_inner": MLP}
    sizes["initializer_range"] = SIZES["initializer_range"]
    config = hf.GPT2Config(vocab_size=128, n_positions=32, **sizes)
    model = hf.FlaxGPT2LMHeadModel(config, (1, 32), _do_init=False)
    return of_hugging_face(model, texts(32), TRANSFORMER)


def equinox():
    """Rows of an image as tokens: attention, LayerNorm and an MLP block of Equinox's own."""
    eqx = pytest.importorskip("equinox", reason="equinox is not installed")

    class Reader(eqx.Module):
        embed: eqx.nn.Linear
        places: jax.Array
        norms: list[eqx.nn.LayerNorm]
        attention: eqx.nn.MultiheadAttention
        block: eqx.nn.MLP
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            self.embed = eqx.nn.Linear(8, D, key=keys[0])
            self.places = 0.1 * jax.random.normal(keys[1], (8, D))
            self.norms = [eqx.nn.LayerNorm(D) for _ in range(3)]
            self.attention = eqx.nn.MultiheadAttention(HEADS, D, key=keys[2])
            self.block = eqx.nn.MLP(D, D, MLP, 1, key=keys[3])
            self.head = eqx.nn.Linear(D, 10, key=keys[4])

        def __call__(self, x):
            x = jax.vmap(self.embed)(x) + self.places
            y = jax.vmap(self.norms[0])(x)
            x = x + self.attention(y, y, y)
            x = x + jax.vmap(self.block)(jax.vmap(self.norms[1])(x))
            return self.head(self.norms[2](x.mean(axis=0)))

    start, rest = eqx.partition(Reader(jax.random.key(0)), eqx.is_array)
    groups = [D, HEADS, D // HEADS, D // HEADS, MLP]
    return Case(lambda v, x: jax.vmap(eqx.combine(v, rest))(x), start, groups, *digits(8, 8))


def haiku():
    """A residual network with BatchNorm, whose statistics are Haiku's state."""
    hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

    @hk.without_apply_rng
    @hk.transform_with_state
    def model(x, training):
        def layer(width, x):
            x = hk.Conv2D(width, 3, with_bias=False)(x)
            return hk.BatchNorm(True, True, 0.9)(x, training)

        x = jax.nn.relu(layer(8, x))
        for _ in range(2):
            x = jax.nn.relu(x + layer(8, jax.nn.relu(layer(12, x))))
        return hk.Linear(10)(x.mean(axis=(1, 2)))

    def loss(params, state, x, y):
        logits, state = model.apply(params, state, x, True)
        return cross_entropy(logits, y).mean(), state

    data = digits(8, 8, 1)
    return Case(
        lambda v, x: model.apply(*v, x, False)[0],
        model.init(jax.random.key(0), data[1][0][:2], True),
        [8, 12, 12],
        *data,
        sections={
            "calibration": np.concatenate([x for x, _ in data[0]]),
            "recalibrate": mj.RecalibrateConfig(enabled=True),
        },
        loss=loss,
    )


def trained(case, variables, data, steps=100):
    """A network after so many steps of Adam on batches of 64."""
    x, y = data
    rows = np.random.default_rng(0).integers(len(y), size=(steps, 64))
    params, state = variables if case.loss is not None else (variables, None)

    def plain(params, state, x, y):
        return cross_entropy(case.apply_fn(params, x), y).mean(), state

    @jax.jit
    def train(params, state, batches):
        def step(carry, batch):
            params, state, moments = carry
            gradient, state = jax.grad(case.loss or plain, has_aux=True)(params, state, *batch)
            updates, moments = adam.update(gradient, moments)
            return (optax.apply_updates(params, updates), state, moments), None

        adam = optax.adam(3e-3)
        return jax.lax.scan(step, (params, state, adam.init(params)), batches)[0][:2]

    params, state = jax.device_get(train(params, state, (x[rows], y[rows])))
    return params if case.loss is None else (params, state)


def measured(case, variables):
    """Scores on examples that nobody has seen, the one that the merge is for among them."""
    metrics = ("accuracy", "cross_entropy")
    tasks = [mj.Task(*case.test, metric=metric, name=metric) for metric in metrics]
    found = mj.score(case.apply_fn, variables, tasks)
    print(found)  # shown where a test fails
    return found


@pytest.mark.parametrize("build", [bert, vit, gpt2, equinox, haiku])
def test_a_network_of_another_library_is_aligned_and_merged(build):
    case = build()
    x = case.choose[0][:8]
    symmetries = mj.find_symmetries(case.apply_fn, case.start, x)
    sizes = collections.Counter(group.size for group in symmetries.groups)
    assert sizes == collections.Counter(case.groups)

    both = [np.concatenate(one) for one in zip(*case.homes, strict=True)]
    base = trained(case, case.start, both)
    one, two = (trained(case, base, home) for home in case.homes)
    verify(jax.random.key(1), symmetries, case.apply_fn, one, x)
    drawn = [random_permutations(jax.random.key(seed), symmetries) for seed in (2, 3)]
    shuffled = permute(symmetries, drawn[0], one)
    outputs = [case.apply_fn(variables, x) for variables in (one, shuffled)]
    np.testing.assert_allclose(*outputs, rtol=1e-3, atol=1e-3)
    leaves = [leaves_by_path(variables) for variables in (one, shuffled)]
    for path in {site.path for group in symmetries.groups for site in group.sites}:
        assert not np.array_equal(*(by_path[path] for by_path in leaves))
    (_, back), _ = mj.align(jax.random.key(4), case.apply_fn, [one, shuffled], x)
    chex.assert_trees_all_equal(back, one)

    parents = [one, permute(symmetries, drawn[1], two)]
    result = mj.merge(
        jax.random.key(5),
        case.apply_fn,
        parents,
        case.choose,
        evolution=mj.EvolutionConfig(population_size=12, generations=15),
        **case.sections,
    )
    *of_parents, merged = (measured(case, variables) for variables in [*parents, result.variables])
    assert merged["cross_entropy"] > max(one["cross_entropy"] for one in of_parents)
    if case.choose[1].ndim == 1:  # a classifier
        assert merged["accuracy"] > max(one["accuracy"] for one in of_parents) + 0.02
