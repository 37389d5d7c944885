"""Training of the parents."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from megajax.errors import ConfigError, DataError, ParentsError
from megajax.zoo import training
from megajax.zoo.data import DataConfig, ParentsConfig, Split, load, shards
from megajax.zoo.networks import build
from megajax.zoo.training import FinetuneConfig, TrainingConfig

KEY = jax.random.key(0)
TINY = TrainingConfig(epochs=2, batch_size=8, learning_rate=1e-2, augment=("flip", "crop"))


@pytest.fixture(scope="module")
def digits():
    return load(0, DataConfig())


@pytest.fixture(scope="module")
def tiny():
    """40 images in three classes, and two overlapping shards of different length."""
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(40, 6, 6, 1)).astype(np.float32)
    split = Split(images, (np.arange(40) % 3).astype(np.int32))
    return split, [np.arange(0, 30, dtype=np.int32), np.arange(20, 40, dtype=np.int32)]


def tiny_model():
    """Dense layers compile fast; BatchNorm brings statistics along."""
    return build("mlp", 3, {"hidden": (4,), "norm": "batch"})


def train_tiny(tiny, key=KEY, config=TINY, model=None, **options):
    return training.train(key, model or tiny_model(), *tiny, config, **options)


def accuracy(model, variables, split):
    logits = jax.jit(model.apply)(variables, split.images)
    return float((np.argmax(logits, axis=-1) == split.labels).mean())


# --- a real pair -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pair_of_digits_networks_learns(digits):
    config = TrainingConfig(epochs=12)
    model = build("cnn", 10)
    dealt = shards(0, digits.train.labels, 10, ParentsConfig(shards="same"))
    parents, history = training.train(KEY, model, digits.train, dealt, config)
    assert all(accuracy(model, parent, digits.test) > 0.97 for parent in parents)
    assert history.loss.shape == history.accuracy.shape == (12, 2)
    assert (history.loss[-1] < 0.2 * history.loss[0]).all()
    assert (history.accuracy[-1] > 0.98).all()


def test_skewed_parents_are_at_home_in_their_classes(digits):
    model = build("mlp", 10, {"hidden": (64,)})
    skewed = ParentsConfig(shards="skewed", skew=1.0)
    dealt = shards(0, digits.train.labels, 10, skewed)
    parents, _ = training.train(KEY, model, digits.train, dealt, TrainingConfig(epochs=10))
    for k, parent in enumerate(parents):
        home = digits.test.labels % 2 == k
        inside, outside = (
            Split(digits.test.images[rows], digits.test.labels[rows]) for rows in (home, ~home)
        )
        assert accuracy(model, parent, inside) > 0.9
        assert accuracy(model, parent, outside) == 0.0


# --- determinism -------------------------------------------------------------------------------


@pytest.mark.slow
def test_equal_keys_give_equal_bits_and_others_do_not(tiny):
    first, again, other = (train_tiny(tiny, key=jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first[1].loss, other[1].loss)
    kernels = [p["params"]["dense1"]["kernel"] for p in (*first[0], *other[0])]
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == 4


def test_stopping_and_going_on_changes_no_bit(tiny):
    model = tiny_model()
    state = training.init(KEY, model, *tiny, TINY)
    losses = []
    for _ in range(TINY.epochs):
        # A new process would make its own function, and read the state from a file.
        state = jax.tree.map(jnp.asarray, jax.device_get(state))
        state, metrics = training.make_epoch(model, *tiny, TINY)(KEY, state)
        losses.append(metrics.loss)
    states = []
    parents, history = train_tiny(tiny, callback=lambda state, metrics: states.append(state))
    chex.assert_trees_all_equal(training._unstack(state.variables), parents)
    np.testing.assert_array_equal(np.stack(losses), history.loss)
    assert int(state.epoch) == 2
    rest, of_rest = train_tiny(tiny, state=states[0])
    chex.assert_trees_all_equal(rest, parents)
    np.testing.assert_array_equal(of_rest.loss, history.loss[1:])


@pytest.mark.slow  # it holds for programs that are optimised
def test_the_mapping_changes_no_bit(tiny):
    by_steps, by_epochs = (train_tiny(tiny, mapping=mapping) for mapping in ("steps", "epochs"))
    chex.assert_trees_all_equal(by_steps, by_epochs)


@pytest.mark.slow
def test_the_mapping_changes_last_bits_of_convolutions_alone(tiny):
    """On a CPU, where XLA has another convolution inside loops."""
    model = build("cnn", 3, {"width": 2})
    by_steps, by_epochs = (
        train_tiny(tiny, model=model, mapping=mapping) for mapping in ("steps", "epochs")
    )
    chex.assert_trees_all_close(by_steps, by_epochs, atol=1e-5)


@pytest.mark.slow
def test_a_parent_has_the_same_bits_in_any_company(tiny, monkeypatch):
    """On as many devices; on another number of them XLA may add in another order."""
    split, (one, other) = tiny
    model = build("cnn", 3, {"width": 2})
    alone, _ = train_tiny((split, [one]), model=model)
    two, first = jax.local_devices()[:2], jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    pair, _ = train_tiny((split, [one, other]), model=model)
    four, _ = train_tiny((split, [one, other, one, one]), model=model)
    chex.assert_trees_all_equal(pair, four[:2])
    chex.assert_trees_all_close(alone, pair[:1], atol=1e-5)
    monkeypatch.setattr(jax, "local_devices", lambda: first)
    trio, _ = train_tiny((split, [one, other, one]), model=model)
    chex.assert_trees_all_equal(alone, trio[:1])
    chex.assert_trees_all_close(pair, trio[:2], atol=1e-5)


def test_parents_do_not_depend_on_their_company(tiny):
    split, (one, other) = tiny
    pair, _ = train_tiny((split, [one, other]))
    trio, _ = train_tiny((split, [one, other, one]))
    chex.assert_trees_all_close(pair, trio[:2], atol=1e-6)


def test_shared_initialization(tiny):
    model = tiny_model()
    for shared in (True, False):
        state = training.init(KEY, model, *tiny, TINY, shared_initialization=shared)
        one, other = (v["params"]["dense1"]["kernel"] for v in training._unstack(state.variables))
        assert np.array_equal(one, other) == shared
    frozen = TINY.replace(learning_rate=0.0)
    (one, other), _ = train_tiny(tiny, config=frozen, shared_initialization=True)
    chex.assert_trees_all_equal(one["params"], other["params"])


# --- fine-tuning -------------------------------------------------------------------------------


# All images in one batch: their order does not matter, and no part of training is needed.
WHOLE = TrainingConfig(
    epochs=7, batch_size=40, optimizer="sgd", schedule="cosine", learning_rate=5.0, momentum=0.5
)
SIX = FinetuneConfig(epochs=6)


def test_fine_tuning_is_a_plain_optax_loop_for_each_network(tiny):
    split, _ = tiny
    model = tiny_model()
    merged, best_parent = (model.init(jax.random.key(k), split.images) for k in (1, 2))
    tuned, history = training.finetune(KEY, model, split, [merged, best_parent], SIX, WHOLE)
    schedule = optax.cosine_decay_schedule(0.5, 6)  # a tenth, over these epochs
    optimizer = optax.sgd(schedule, momentum=0.5, nesterov=True)

    @jax.jit
    def step(variables, state):
        def loss_fn(params):
            logits, updated = model.apply(
                {**variables, "params": params}, split.images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels)
            return losses.mean(), updated

        (loss, updated), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, state = optimizer.update(gradients, state)
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, state, loss

    for k, variables in enumerate((merged, best_parent)):
        state, losses = optimizer.init(variables["params"]), []
        for _ in range(6):
            variables, state, loss = step(variables, state)
            losses.append(loss)
        chex.assert_trees_all_close(tuned[k], variables, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(history.loss[:, k], losses, rtol=1e-4)
    assert history.loss.shape == history.accuracy.shape == (6, 2)


def test_no_epochs_of_fine_tuning_change_nothing(tiny):
    networks = [{"params": {"kernel": np.ones(2)}}] * 2
    same, history = training.finetune(KEY, tiny_model(), tiny[0], networks, FinetuneConfig())
    assert all(one is other for one, other in zip(same, networks, strict=True))
    assert history.loss.shape == (0, 2)


def test_fine_tuning_that_diverges_names_its_own_rate(tiny):
    model = tiny_model()
    good = model.init(KEY, tiny[0].images)
    bad = jax.tree.map(lambda leaf: leaf * jnp.inf, good)
    with pytest.raises(ParentsError, match=r"finetune: parent 1: .* finetune.learning_rate below"):
        training.finetune(KEY, model, tiny[0], [good, bad], SIX, WHOLE)


# --- shards, batches ---------------------------------------------------------------------------


def test_each_image_once_before_any_twice():
    shard = jnp.array([10, 11, 12, 13, 14, 0, 0, 0])
    batches = training._shuffled(KEY, shard, jnp.int32(5), (3, 4))
    assert batches.shape == (3, 4)
    turns = np.asarray(batches).ravel()
    np.testing.assert_array_equal(np.sort(turns[:5]), np.arange(10, 15))
    np.testing.assert_array_equal(turns[5:10], turns[:5])
    other = training._shuffled(jax.random.key(1), shard, jnp.int32(5), (3, 4))
    assert not np.array_equal(batches, other)


class Spy(nn.Module):
    """Counts in its statistics how often it sees each label, coded as the pixel's value."""

    @nn.compact
    def __call__(self, x, train=False):
        counts = self.variable("spy", "counts", jnp.zeros, (40,))
        if train:
            counts.value += jnp.zeros(40).at[x[:, 0, 0, 0].astype(jnp.int32)].add(1.0)
        return nn.Dense(3)(x.reshape(len(x), -1))


@pytest.mark.parametrize("mapping", ["steps", "epochs"])
def test_a_parent_sees_its_own_shard_and_all_of_it(tiny, mapping):
    split, dealt = tiny
    numbered = split._replace(images=np.arange(40.0, dtype=np.float32).reshape(40, 1, 1, 1))
    config = TrainingConfig(epochs=2, batch_size=8, learning_rate=0.0)
    parents, _ = train_tiny((numbered, dealt), config=config, model=Spy(), mapping=mapping)
    for parent, shard in zip(parents, dealt, strict=True):
        counts = np.asarray(parent["spy"]["counts"])
        assert counts.sum() == 2 * 32  # as many steps as the longest shard needs
        inside = np.isin(np.arange(40), shard)
        assert (counts[~inside] == 0).all()
        assert (counts[inside] >= 2).all()
        assert counts.max() <= 2 * -(-32 // len(shard))


def test_a_batch_larger_than_a_shard(tiny):
    config = TINY.replace(batch_size=64)
    _, history = train_tiny(tiny, config=config)
    assert np.isfinite(history.loss).all()


@pytest.mark.parametrize("mapping", ["steps", "epochs"])
def test_one_trace_for_all_steps_epochs_and_seeds(tiny, mapping, monkeypatch):
    counted = chex.assert_max_traces(training.augment, n=1)
    monkeypatch.setattr(training, "augment", counted)
    chex.clear_trace_counter()
    config = TINY.replace(epochs=3)
    for seed in range(2):
        train_tiny(tiny, key=jax.random.key(seed), config=config, mapping=mapping)


# --- optimizers, schedules ---------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weight_decay_leaves_all_but_kernels_alone(optimizer):
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    zeros = optax.tree.zeros_like(params)
    for decay in (0.0, 0.1):
        config = TrainingConfig(optimizer=optimizer, weight_decay=decay, schedule="constant")
        transformation = training.make_optimizer(config, 10)
        updates, _ = transformation.update(zeros, transformation.init(params), params)
        assert (updates["bias"] == 0).all()
        assert (updates["kernel"] < 0).all() == (decay > 0)


def test_decoupled_and_added_decay_differ():
    params, gradient = {"kernel": jnp.ones((1, 1))}, {"kernel": jnp.full((1, 1), 2.0)}
    config = TrainingConfig(weight_decay=0.1, schedule="constant", learning_rate=0.5)

    def update(**changes):
        transformation = training.make_optimizer(config.replace(**changes), 10)
        updates, _ = transformation.update(gradient, transformation.init(params), params)
        return float(updates["kernel"][0, 0])

    # Nesterov's first step is (1 + momentum) times the gradient.
    assert update(optimizer="sgd", momentum=0.9) == pytest.approx(-0.5 * 1.9 * 2.1)
    assert update(optimizer="adam") == pytest.approx(-0.5, rel=1e-5)
    assert update(optimizer="adamw") == pytest.approx(-0.5 * (1 + 0.1), rel=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 2.0])
def test_schedules(schedule, warmup):
    config = TrainingConfig(epochs=4, learning_rate=0.1, schedule=schedule, warmup_epochs=warmup)
    rate = jax.vmap(training.make_schedule(config, 10))(jnp.arange(41))
    start = int(warmup * 10)
    expected = np.full(41, 0.1)
    if schedule == "cosine":
        expected[start:] = 0.05 * (1 + np.cos(np.pi * np.linspace(0, 1, 41 - start)))
    expected[:start] = 0.1 * np.arange(start) / max(start, 1)
    np.testing.assert_allclose(rate, expected, atol=1e-7)


def test_warmup_must_end():
    with pytest.raises(ConfigError, match=r"training.warmup_epochs is 2.0: it must be below the 2"):
        training.make_schedule(TrainingConfig(epochs=2, warmup_epochs=2.0), 10)


# --- augmentation ------------------------------------------------------------------------------


def test_flip_mirrors_about_half_of_the_images():
    images = np.random.default_rng(0).uniform(size=(200, 4, 6, 3)).astype(np.float32)
    out = np.asarray(training.augment(KEY, jnp.asarray(images), ("flip",)))
    flipped = [np.array_equal(o, i[:, ::-1]) for o, i in zip(out, images, strict=True)]
    kept = [np.array_equal(o, i) for o, i in zip(out, images, strict=True)]
    assert (np.array(flipped) ^ np.array(kept)).all()
    assert 70 < sum(flipped) < 130


@pytest.mark.parametrize("shape", [(8, 8), (32, 16)])
def test_crop_is_a_window_of_the_padded_image(shape):
    height, width = shape
    tall, wide = height // 8, width // 8
    images = np.random.default_rng(0).uniform(0.1, 1, (300, height, width, 2)).astype(np.float32)
    out = np.asarray(training.augment(KEY, jnp.asarray(images), ("crop",)))
    corners = set()
    for image, cropped in zip(images, out, strict=True):
        padded = np.pad(image, ((tall, tall), (wide, wide), (0, 0)))
        found = [
            (top, left)
            for top in range(2 * tall + 1)
            for left in range(2 * wide + 1)
            if np.array_equal(padded[top : top + height, left : left + width], cropped)
        ]
        assert len(found) == 1
        corners.add(found[0])
    assert len(corners) == (2 * tall + 1) * (2 * wide + 1)


def test_no_augmentation_is_no_change():
    images = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert training.augment(KEY, images, ()) is images


# --- callbacks, errors, other networks ---------------------------------------------------------


def test_callback_gets_each_epoch(tiny):
    seen = []
    _, history = train_tiny(tiny, callback=lambda *arguments: seen.append(arguments))
    assert [int(state.epoch) for state, _ in seen] == [1, 2]
    np.testing.assert_array_equal([metrics.loss for _, metrics in seen], history.loss)


@pytest.mark.parametrize("mapping", ["steps", "epochs"])
def test_divergence_names_the_parent_and_the_epoch(tiny, mapping):
    split, dealt = tiny
    images = split.images.copy()
    images[35] = np.inf  # seen by parent 1 alone
    with pytest.raises(ParentsError, match="parent 1: training diverged in epoch 0") as caught:
        train_tiny((split._replace(images=images), dealt), mapping=mapping)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ([], "the shard of parent 1 must be a list of indices, at least one; it is float64 [0]"),
        ([[0]], "it is int64 [1, 1]"),
        ([0.5], "it is float64 [1]"),
        ([0, 40], "the shard of parent 1 holds indices from 0 to 40, there are 40 images"),
        ([-1], "holds indices from -1 to -1"),
    ],
)
def test_a_shard_that_cannot_be_is_an_error(tiny, shard, message):
    split, (good, _) = tiny
    with pytest.raises(DataError) as caught:
        train_tiny((split, [good, shard]))
    assert message in str(caught.value)


@pytest.mark.parametrize(("name", "slow"), [("resnet", False), ("xception", True)])
def test_networks_whose_gradients_are_slow_inside_loops_are_known(name, slow):
    model = build(name, 3, {"width": 2} if name == "resnet" else {})
    image = np.zeros((1, 32, 32, 3), np.float32)
    assert training._is_slow_in_loops(training._Recipe(model, TINY, 1), image) == slow


def test_an_unknown_mapping_is_an_error(tiny):
    with pytest.raises(ConfigError, match="mapping is 'pmap'"):
        train_tiny(tiny, mapping="pmap")


def test_dropout_has_a_key_and_no_statistics_are_needed(tiny):
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dropout(0.5, deterministic=not train)(x.reshape(len(x), -1))
            return nn.Dense(3)(x)

    parents, _ = train_tiny(tiny, model=Dropping())
    assert set(parents[0]) == {"params"}


def test_bfloat16_training_keeps_float32_parameters(tiny):
    model = build("mlp", 3, {"hidden": (4,), "norm": "batch", "dtype": "bfloat16"})
    parents, history = train_tiny(tiny, model=model)
    chex.assert_type(jax.tree.leaves(parents), jnp.float32)
    assert history.loss.dtype == np.float32


def test_strict_promotion_rules_are_no_obstacle(tiny):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        config = TINY.replace(weight_decay=1e-3, warmup_epochs=0.5)
        train_tiny(tiny, config=config)
