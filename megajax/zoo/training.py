"""Trains all parents with one compiled program, one network at a time.

The parents are stacked leaf by leaf, [K, ...], and each epoch trains each of them on its own
shard. `init` and `make_epoch` are the pieces, `train` is the loop around them:

    state = init(key, model, split, shards, config)
    run_epoch = make_epoch(model, split, shards, config)
    state, metrics = run_epoch(key, state)          # as often as there are epochs

Everything random in epoch e of parent k comes from the key folded with k and e, so that training
can stop after any epoch and go on from the state, bit for bit.

Networks side by side (`vmap`) would make grouped convolutions of all convolutions, which are many
times slower on every backend. So an epoch of a parent is one program, and as many parents as there
are devices train at a time. Only where a CPU would compute gradients slowly inside compiled loops
(those of depthwise convolutions) does each step have a program of its own.

Example:
    >>> from megajax.zoo.networks.mlp import MLP
    >>> images, labels = np.zeros((8, 4, 4, 1), np.float32), np.arange(8, dtype=np.int32) % 2
    >>> parents, history = train(
    ...     jax.random.key(0),
    ...     MLP(num_classes=2, hidden=(4,)),
    ...     Split(images, labels),
    ...     [np.arange(0, 6), np.arange(2, 8)],
    ...     TrainingConfig(epochs=2, batch_size=4),
    ... )
    >>> len(parents), history.loss.shape, jax.tree.map(jnp.shape, parents[0]["params"]["dense1"])
    (2, (2, 2), {'bias': (4,), 'kernel': (16, 4)})
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from megajax.errors import ConfigError, DataError, ParentsError
from megajax.program.gradients import all_are_fast, with_fast_gradients
from megajax.sections import Fraction, Section, at_least, one_of
from megajax.zoo.data import Split

__all__ = [
    "AUGMENTATIONS",
    "OPTIMIZERS",
    "SCHEDULES",
    "FinetuneConfig",
    "Metrics",
    "TrainState",
    "TrainingConfig",
    "augment",
    "begin_finetuning",
    "finetune",
    "init",
    "make_epoch",
    "make_optimizer",
    "make_schedule",
    "train",
]

Variables = Any  # the pytree of a Linen module: {"params": ..., "batch_stats": ...}


def _flip(key: jax.Array, images: jax.Array) -> jax.Array:
    flips = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flips, images[:, :, ::-1], images)


def _crop(key: jax.Array, images: jax.Array) -> jax.Array:
    count, height, width, _ = images.shape
    tall, wide = max(height // 8, 1), max(width // 8, 1)
    tops, lefts = jax.random.randint(
        key, (2, count, 1), 0, jnp.array([2 * tall + 1, 2 * wide + 1])[:, None, None]
    )
    rows, columns = tops + jnp.arange(height)[None], lefts + jnp.arange(width)[None]
    padded = jnp.pad(images, ((0, 0), (tall, tall), (wide, wide), (0, 0)))
    return padded[jnp.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "flip": _flip,
    "crop": _crop,
}
"""What is done to training images, in this order: name -> `(key, [N, H, W, C]) -> images`."""

SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "cosine": optax.cosine_decay_schedule,
}
"""How the learning rate goes on after the warm-up: name -> `(peak, steps) -> schedule`."""


def _sgd(config: TrainingConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return _decayed(config, optax.sgd(schedule, momentum=config.momentum, nesterov=True))


def _adam(config: TrainingConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return _decayed(config, optax.adam(schedule))


def _adamw(config: TrainingConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, weight_decay=config.weight_decay, mask=_is_kernel)


def _decayed(
    config: TrainingConfig, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
    if not config.weight_decay:
        return optimizer
    return optax.chain(optax.add_decayed_weights(config.weight_decay, mask=_is_kernel), optimizer)


def _is_kernel(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
}
"""Name -> `(config, schedule) -> optax transformation`."""


class TrainingConfig(Section):
    """How each parent is trained.

    Attributes:
        epochs: passes over a parent's shard.
        batch_size: images per step and parent.
        optimizer: `sgd` (Nesterov momentum), `adam` or `adamw`.
        learning_rate: peak learning rate.
        schedule: `constant` or `cosine` (to zero).
        warmup_epochs: epochs of linear warm-up before the schedule.
        momentum: for `sgd`.
        weight_decay: decoupled for `adamw`; added to the gradient of kernels for the others.
        augment: any of `flip` (left-right) and `crop` (pad by an eighth of the side, crop back).
    """

    section = "training"
    epochs: Annotated[int, at_least(1)] = 20
    batch_size: Annotated[int, at_least(1)] = 64
    optimizer: Annotated[str, one_of(OPTIMIZERS)] = "adam"
    learning_rate: Annotated[float, at_least(0)] = 3e-3
    schedule: Annotated[str, one_of(SCHEDULES)] = "cosine"
    warmup_epochs: Annotated[float, at_least(0)] = 0.0
    momentum: Fraction = 0.9
    weight_decay: Annotated[float, at_least(0)] = 0.0
    augment: tuple[Annotated[str, one_of(AUGMENTATIONS)], ...] = ()


class FinetuneConfig(Section):
    """Training after the merge; the best parent is trained just as long, to compare with.

    All that is not said here is as in the `training` section, but without warm-up.

    Attributes:
        epochs: passes over the training images; 0 is off. MeGA's many-parent merge has 10.
        learning_rate: peak learning rate; None is a tenth of the training's.
    """

    section = "finetune"
    epochs: Annotated[int, at_least(0)] = 0
    learning_rate: Annotated[float, at_least(0)] | None = None


class TrainState(NamedTuple):
    """All that training carries from one epoch to the next.

    Attributes:
        variables: the parents' variables, stacked leaf by leaf, [K, ...].
        optimizer: the optimizers' states, stacked leaf by leaf, [K, ...].
        epoch: int32 [], epochs done.
    """

    variables: Variables
    optimizer: optax.OptState
    epoch: jax.Array


class Metrics(NamedTuple):
    """How training went, over the images of an epoch as they were trained on.

    Attributes:
        loss: mean cross-entropy, float32 [K] for one epoch, [epochs, K] for a history.
        accuracy: share of images classified right, of the same shape.
    """

    loss: chex.Array
    accuracy: chex.Array


def train(
    key: jax.Array,
    model: nn.Module,
    split: Split,
    shards: Sequence[npt.ArrayLike],
    config: TrainingConfig,
    *,
    shared_initialization: bool = False,
    state: TrainState | None = None,
    callback: Callable[[TrainState, Metrics], None] | None = None,
    mapping: str = "auto",
) -> tuple[list[Variables], Metrics]:
    """Trains one parent per shard, all of them with one compiled program.

    Args:
        key: the source of all randomness.
        model: a Linen module, called as `model.apply(variables, images, train=True)`. Collections
            other than `params` (BatchNorm's statistics) are updated along the way.
        split: the training images.
        shards: K arrays of indices into the split, one per parent. An epoch has as many steps as
            the longest shard needs; shorter ones start over within it.
        config: how to train.
        shared_initialization: all parents start from the same weights.
        state: where to start: where an earlier call with the same other arguments got to, or
            `begin` from given weights. None starts anew.
        callback: called after each epoch with the state, which the next epoch uses up, and the
            epoch's metrics [K].
        mapping: `epochs` runs an epoch as one program, `steps` each step. `auto` takes `steps` on
            a CPU for networks whose gradients it computes slowly inside loops, else `epochs`.

    Returns:
        K variables pytrees, and the metrics [epochs, K] of the epochs that this call did.

    Raises:
        ConfigError: `mapping` or the schedule cannot work.
        DataError: a shard is empty, or holds what is no index into the split; names the parent.
        ParentsError: a parent's loss or weights are not finite; names the parent and the epoch.
    """
    if state is None:
        state = init(key, model, split, shards, config, shared_initialization=shared_initialization)
    state = jax.tree.map(jnp.copy, state)  # an epoch uses up the state that it is given
    run_epoch = make_epoch(model, split, shards, config, mapping=mapping)
    history = [Metrics(*np.zeros((2, 0, len(shards)), np.float32))]
    for epoch in range(int(state.epoch), config.epochs):
        state, metrics = run_epoch(key, state)
        metrics = jax.device_get(metrics)
        if not np.isfinite(metrics.loss).all():
            parent = int(np.flatnonzero(~np.isfinite(metrics.loss))[0])
            raise ParentsError(
                f"parent {parent}: training diverged in epoch {epoch} (loss or weights are not "
                f"finite); try a training.learning_rate below {config.learning_rate:g}"
            )
        history.append(jax.tree.map(lambda leaf: leaf[None], metrics))
        if callback is not None:
            callback(state, metrics)
    return _unstack(state.variables), Metrics(*map(np.concatenate, zip(*history, strict=True)))


def init(
    key: jax.Array,
    model: nn.Module,
    split: Split,
    shards: Sequence[npt.ArrayLike],
    config: TrainingConfig,
    *,
    shared_initialization: bool = False,
) -> TrainState:
    """The state before the first epoch. Arguments as for `train`.

    Returns:
        Freshly initialised parents: parent k from the key folded with k, or all of them with
        parent 0's weights if the initialisation is shared.

    Raises:
        ConfigError: the schedule cannot work.
        DataError: a shard is empty, or holds what is no index into the split; names the parent.
    """
    steps = _steps(_checked(shards, split), config)
    init_key, _ = jax.random.split(key)
    sources = [0 if shared_initialization else parent for parent in range(len(shards))]
    image = jnp.zeros_like(split.images[:1])
    keys = [jax.random.fold_in(init_key, source) for source in sources]
    return _started([_init(key, image, _Recipe(model, config, steps)) for key in keys])


def finetune(
    key: jax.Array,
    model: nn.Module,
    split: Split,
    networks: Sequence[Variables],
    config: FinetuneConfig,
    training: TrainingConfig | None = None,
    *,
    state: TrainState | None = None,
    callback: Callable[[TrainState, Metrics], None] | None = None,
) -> tuple[list[Variables], Metrics]:
    """Trains networks further, all of them for as long and on the same images.

    A merged network that was fine-tuned should be compared with the best parent fine-tuned just as
    long, which may have gained as much: give both.

    Args:
        key: the source of all randomness.
        model: as for `train`.
        split: the training images, all of which each network sees.
        networks: K variables pytrees.
        config: how long, and at which learning rate.
        training: the rest; None takes the defaults. There is no warm-up.
        state: where an earlier call got to; None starts from `begin_finetuning`.
        callback: as for `train`.

    Returns:
        The K networks (as they were given, if there are no epochs), and the metrics [epochs, K].

    Raises:
        ParentsError: a network's loss or weights are not finite; names its place and the epoch.

    Example:
        >>> from megajax.zoo.networks.mlp import MLP
        >>> model, images = MLP(num_classes=2, hidden=()), np.eye(2, dtype=np.float32)
        >>> images = images.reshape(2, 1, 2, 1)
        >>> merged, best_parent = (model.init(jax.random.key(k), images) for k in range(2))
        >>> (merged, best_parent), history = finetune(
        ...     jax.random.key(0),
        ...     model,
        ...     Split(images, np.arange(2, dtype=np.int32)),
        ...     [merged, best_parent],
        ...     FinetuneConfig(epochs=10, learning_rate=0.1),
        ... )
        >>> bool((history.loss[-1] < history.loss[0]).all())
        True
    """
    if config.epochs == 0:
        return list(networks), Metrics(*np.zeros((2, 0, len(networks)), np.float32))
    longer, shards = _longer(config, training), _all_of(split, networks)
    try:
        state = state or begin_finetuning(split, networks, config, training)
        return train(key, model, split, shards, longer, state=state, callback=callback)
    except ParentsError as error:
        message = str(error).replace("training.learning_rate", "finetune.learning_rate")
        raise ParentsError(f"finetune: {message}") from None


def begin_finetuning(
    split: Split,
    networks: Sequence[Variables],
    config: FinetuneConfig,
    training: TrainingConfig | None = None,
) -> TrainState:
    """The state before the first epoch of `finetune`, of at least one. Arguments as for that."""
    longer = _longer(config, training)
    shards = _checked(_all_of(split, networks), split)
    optimizer = make_optimizer(longer, _steps(shards, longer))
    given = [jax.tree.map(jnp.asarray, one) for one in networks]
    return _started([_Learner(one, optimizer.init(one["params"])) for one in given])


def _longer(config: FinetuneConfig, training: TrainingConfig | None) -> TrainingConfig:
    training, rate = training or TrainingConfig(), config.learning_rate
    return training.replace(
        epochs=config.epochs,
        learning_rate=training.learning_rate / 10 if rate is None else rate,
        warmup_epochs=0.0,
    )


def _all_of(split: Split, networks: Sequence[Variables]) -> list[npt.NDArray[Any]]:
    return [np.arange(len(split.labels))] * len(networks)


def make_epoch(
    model: nn.Module,
    split: Split,
    shards: Sequence[npt.ArrayLike],
    config: TrainingConfig,
    *,
    mapping: str = "auto",
) -> Callable[[jax.Array, TrainState], tuple[TrainState, Metrics]]:
    """Makes the function that trains all parents for one more epoch. Arguments as for `train`.

    Returns:
        `run_epoch(key, state) -> (state, metrics)`, which uses up the state that it is given. The
        metrics are [K]; the loss of a parent whose weights are not finite is NaN.

    Raises:
        ConfigError: `mapping` cannot work.
        DataError: a shard is empty, or holds what is no index into the split; names the parent.
    """
    if mapping not in ("auto", *_MAPPINGS):
        raise ConfigError(f"mapping is {mapping!r}: choose one of auto, {', '.join(_MAPPINGS)}")
    indices = _checked(shards, split)
    recipe = _Recipe(model, config, _steps(indices, config))
    if mapping == "auto":
        slow = jax.default_backend() == "cpu" and _is_slow_in_loops(recipe, split.images[:1])
        mapping = "steps" if slow else "epochs"
    mesh = _mesh(len(shards))
    everywhere, own = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), _EACH))
    data = jax.device_put((split.images, split.labels), everywhere)
    shape, sizes = (recipe.steps, config.batch_size), jnp.array(list(map(len, indices)))
    padded = jnp.stack([jnp.resize(shard, (max(map(len, indices)),)) for shard in indices])

    def run_epoch(key: jax.Array, state: TrainState) -> tuple[TrainState, Metrics]:
        plans = _plans(key, state.epoch, padded, sizes, shape)
        learners, done = _Learner(state.variables, state.optimizer), []
        for start in range(0, len(shards), mesh.size):
            now = jax.tree.map(lambda leaf: leaf[start : start + mesh.size], (learners, plans))  # noqa: B023
            done.append(_MAPPINGS[mapping](data, *jax.device_put(now, own), recipe, mesh))
        learners, metrics = jax.tree.map(lambda *parts: jnp.concatenate(parts), *done)
        learners, metrics = jax.device_put((learners, metrics), mesh.devices.flat[0])
        return TrainState(learners.variables, learners.optimizer, state.epoch + 1), metrics

    return run_epoch


def make_schedule(config: TrainingConfig, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up, then constant or a cosine down to zero.

    Args:
        config: how to train.
        steps_per_epoch: steps in an epoch.

    Returns:
        A function from the step to the learning rate.

    Raises:
        ConfigError: the warm-up takes all epochs.

    Example:
        >>> schedule = make_schedule(TrainingConfig(epochs=2, warmup_epochs=1, learning_rate=1), 10)
        >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 15, 20)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if config.warmup_epochs >= config.epochs:
        raise ConfigError(
            f"training.warmup_epochs is {config.warmup_epochs!r}: it must be below the "
            f"{config.epochs} epochs of training"
        )
    warmup = round(config.warmup_epochs * steps_per_epoch)
    rest = config.epochs * steps_per_epoch - warmup
    rate = SCHEDULES[config.schedule](config.learning_rate, rest)
    if warmup:
        rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
        rate = optax.join_schedules([rise, rate], [warmup])
    return rate


def make_optimizer(
    config: TrainingConfig, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with its schedule; weight decay acts on kernels (leaves of rank > 1) only.

    Args:
        config: how to train.
        steps_per_epoch: steps in an epoch.

    Returns:
        The optax transformation.

    Raises:
        ConfigError: the schedule cannot work.

    Example:
        >>> optimizer = make_optimizer(TrainingConfig(optimizer="sgd", weight_decay=0.1), 10)
        >>> params = {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}
        >>> zeros = optax.tree.zeros_like(params)
        >>> updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        >>> bool(updates["kernel"] < 0), bool(updates["bias"] < 0)
        (True, False)
    """
    schedule = make_schedule(config, steps_per_epoch)
    return optax.with_extra_args_support(OPTIMIZERS[config.optimizer](config, schedule))


def augment(key: jax.Array, images: jax.Array, kinds: Sequence[str]) -> jax.Array:
    """Flips and shifts each image by its own chance.

    Args:
        key: the source of the draws.
        images: [N, H, W, C].
        kinds: any of `flip` (left-right, every second image) and `crop` (pad with zeros by an
            eighth of the side, but at least one pixel, and cut an image of the old size anywhere).

    Returns:
        Images of the same shape and dtype.

    Example:
        >>> images = jnp.arange(4.0).reshape(2, 1, 2, 1)
        >>> augment(jax.random.key(1), images, ("flip",)).reshape(2, 2).tolist()
        [[0.0, 1.0], [3.0, 2.0]]
    """
    keys = jax.random.split(key, len(AUGMENTATIONS))
    for own_key, (name, change) in zip(keys, AUGMENTATIONS.items(), strict=True):
        images = change(own_key, images) if name in kinds else images
    return images


class _Learner(NamedTuple):
    """What one parent carries from one step to the next."""

    variables: Variables
    optimizer: optax.OptState


class _Plan(NamedTuple):
    """What the steps of an epoch get: a key [steps] and the indices of a batch [steps, B]."""

    keys: jax.Array
    batches: jax.Array


class _Recipe(NamedTuple):
    """What the jitted functions know by value; the images are an argument.

    So they are compiled once for all epochs, parents and seeds, without the images.
    """

    model: nn.Module
    config: TrainingConfig
    steps: int  # of an epoch

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(self.config, self.steps)


_Data: TypeAlias = tuple[jax.Array, jax.Array]  # images and labels
_jit = functools.partial(jax.jit, static_argnames=("recipe", "mesh"))
_EACH = PartitionSpec("parent")


@functools.partial(jax.jit, static_argnames="recipe")
def _init(key: jax.Array, image: jax.Array, recipe: _Recipe) -> _Learner:
    variables = recipe.model.init(key, image)
    return _Learner(variables, recipe.optimizer().init(variables["params"]))


@functools.partial(jax.jit, static_argnames="shape")
def _plans(
    key: jax.Array, epoch: jax.Array, shards: jax.Array, sizes: jax.Array, shape: tuple[int, int]
) -> _Plan:
    """The plans [K] of an epoch, for K shards [K, longest] of the given sizes [K]."""
    _, train_key = jax.random.split(key)

    def plan(parent: jax.Array, shard: jax.Array, size: jax.Array) -> _Plan:
        epoch_key = jax.random.fold_in(jax.random.fold_in(train_key, parent), epoch)
        shuffle_key, steps_key = jax.random.split(epoch_key)
        return _Plan(
            jax.random.split(steps_key, shape[0]), _shuffled(shuffle_key, shard, size, shape)
        )

    return jax.vmap(plan)(jnp.arange(len(sizes)), shards, sizes)


def _step(data: _Data, learner: _Learner, plan: _Plan, recipe: _Recipe) -> tuple[_Learner, Metrics]:
    """One step of one parent: the same bits in a program of its own and inside a loop.

    But for convolutions on a CPU, whose sums XLA orders otherwise inside loops.
    """
    learner, plan = jax.lax.optimization_barrier((learner, plan))
    (images, labels), (key, batch) = data, plan
    augment_key, dropout_key = jax.random.split(key)
    x, y = augment(augment_key, images[batch], recipe.config.augment), labels[batch]
    params = learner.variables["params"]
    statistics = {name: v for name, v in learner.variables.items() if name != "params"}

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, dict[str, Any]]]:

        def forward(variables: Any, x: jax.Array, key: jax.Array) -> Any:
            rngs, mutable = {"dropout": key}, list(statistics)
            return recipe.model.apply(variables, x, train=True, mutable=mutable, rngs=rngs)

        variables = {"params": params, **statistics}
        one_core = len(jax.local_devices()) >= (os.cpu_count() or 1)
        fast = with_fast_gradients(forward, one_core=one_core)
        logits, updated = fast(variables, x, dropout_key)
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, (jnp.mean(jnp.argmax(logits, axis=-1) == y), {**statistics, **updated})

    (loss, (accuracy, statistics)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    # optax mixes the integers it counts in with floats, which the user may have forbidden.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = recipe.optimizer().update(gradients, learner.optimizer, params)
    params = optax.apply_updates(params, updates)
    new = _Learner({"params": params, **statistics}, state), Metrics(loss, accuracy)
    return cast("tuple[_Learner, Metrics]", jax.lax.optimization_barrier(new))


def _summary(learner: _Learner, metrics: Metrics) -> Metrics:
    """Means over the steps; the loss is NaN once a weight is not finite."""
    leaves = jax.tree.leaves(learner.variables)
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
    return Metrics(jnp.where(finite, metrics.loss.mean(), jnp.nan), metrics.accuracy.mean())


def _mesh(count: int) -> Mesh:
    """As many devices as so many parents can be shared among evenly."""
    there = jax.local_devices()
    most = max(n for n in range(1, min(count, len(there)) + 1) if count % n == 0)
    return Mesh(np.array(there[:most]), ("parent",))


def _is_slow_in_loops(recipe: _Recipe, image: npt.NDArray[Any]) -> bool:
    def forward(variables: Variables, x: jax.Array) -> Any:
        rngs, mutable = {"dropout": jax.random.key(0)}, list(variables)
        return recipe.model.apply(variables, x, train=True, mutable=mutable, rngs=rngs)

    learner = jax.eval_shape(functools.partial(_init, recipe=recipe), jax.random.key(0), image)
    return not all_are_fast(forward, learner.variables, image)


@functools.partial(_jit, donate_argnames="learners")
def _epoch(
    data: _Data, learners: _Learner, plans: _Plan, recipe: _Recipe, mesh: Mesh
) -> tuple[_Learner, Metrics]:
    """An epoch of the parents [n], each on a device of its own, in one compiled call."""

    def own(data: _Data, learner: _Learner, plan: _Plan) -> tuple[_Learner, Metrics]:
        learner, metrics = jax.lax.scan(
            functools.partial(_step, data, recipe=recipe), learner, plan
        )
        return learner, _summary(learner, metrics)

    return _on_own_devices(own, mesh, data, learners, plans)


def _in_steps(
    data: _Data, learners: _Learner, plans: _Plan, recipe: _Recipe, mesh: Mesh
) -> tuple[_Learner, Metrics]:
    """The same, with a compiled call for each step."""
    history = []
    for number in range(recipe.steps):
        learners, metrics = _steps_of(data, learners, plans, number, recipe, mesh)
        history.append(metrics)
    return learners, _summaries(learners, jax.tree.map(lambda *m: jnp.stack(m, 1), *history))


@functools.partial(_jit, donate_argnames="learners")
def _steps_of(
    data: _Data, learners: _Learner, plans: _Plan, number: jax.Array, recipe: _Recipe, mesh: Mesh
) -> tuple[_Learner, Metrics]:
    def own(data: _Data, learner: _Learner, plan: _Plan) -> tuple[_Learner, Metrics]:
        return _step(data, learner, plan, recipe)

    plans = jax.tree.map(lambda leaf: leaf[:, number], plans)
    return _on_own_devices(own, mesh, data, learners, plans)


def _on_own_devices(
    function: Callable[[_Data, _Learner, _Plan], tuple[_Learner, Metrics]],
    mesh: Mesh,
    data: _Data,
    learners: _Learner,
    plans: _Plan,
) -> tuple[_Learner, Metrics]:
    """What a function of one parent gives for each of them, [n], on as many devices."""

    def own(data: _Data, learners: _Learner, plans: _Plan) -> Any:
        learner, plan = jax.tree.map(lambda leaf: leaf[0], (learners, plans))
        return jax.tree.map(lambda leaf: leaf[None], function(data, learner, plan))

    specs = (PartitionSpec(), _EACH, _EACH)
    shared = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=_EACH, check_vma=False)
    return cast("tuple[_Learner, Metrics]", shared(data, learners, plans))


_summaries = jax.jit(jax.vmap(_summary))

_MAPPINGS: dict[str, Callable[..., tuple[_Learner, Metrics]]] = {
    "epochs": _epoch,
    "steps": _in_steps,
}


def _started(learners: Sequence[_Learner]) -> TrainState:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *learners)
    return TrainState(stacked.variables, stacked.optimizer, jnp.zeros((), jnp.int32))


def _unstack(tree: Any) -> list[Any]:
    count = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(operator.itemgetter(k), tree) for k in range(count)]


def _checked(shards: Sequence[npt.ArrayLike], split: Split) -> list[npt.NDArray[np.int32]]:
    """The shards as arrays; a wrong index would go unnoticed later on."""
    indices = [np.asarray(shard) for shard in shards]
    for parent, shard in enumerate(indices):
        if shard.ndim != 1 or not len(shard) or not np.issubdtype(shard.dtype, np.integer):
            raise DataError(
                f"the shard of parent {parent} must be a list of indices, at least one; it is "
                f"{shard.dtype} {list(shard.shape)}"
            )
        if shard.min() < 0 or shard.max() >= len(split.labels):
            raise DataError(
                f"the shard of parent {parent} holds indices from {shard.min()} to {shard.max()}, "
                f"there are {len(split.labels)} images"
            )
    return [shard.astype(np.int32) for shard in indices]


def _steps(shards: Sequence[npt.NDArray[np.int32]], config: TrainingConfig) -> int:
    return math.ceil(max(map(len, shards)) / config.batch_size)


def _shuffled(
    key: jax.Array, shard: jax.Array, size: jax.Array, shape: tuple[int, int]
) -> jax.Array:
    """The first `size` entries of the shard in random order, over and over until `shape` is full.

    Each of them appears before any appears again.
    """
    order = jax.random.uniform(key, shard.shape)
    order = jnp.argsort(jnp.where(jnp.arange(len(shard)) < size, order, jnp.inf))
    turns = jnp.arange(math.prod(shape)) % size
    return shard[order[turns]].reshape(shape)
