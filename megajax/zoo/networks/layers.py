"""What the networks of the zoo have in common: normalisation layers by name, kernels, the head.

Every network is a Linen module whose `__call__(x, train=False)` maps images [N, H, W, C] to float32
logits [N, num_classes]; `train=True` makes BatchNorm use (and update) the batch's statistics.
Options are plain numbers, strings and booleans, so that a configuration file can hold them. `dtype`
is the type to compute in (for example `"bfloat16"`); parameters and statistics stay float32.

Example:
    >>> norm_layer("batch", train=False)(name="norm").use_running_average
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.errors import ConfigError

__all__ = [
    "NORMS",
    "STEMS",
    "check_option",
    "conv",
    "halve",
    "kernel_init",
    "max_pool",
    "norm_layer",
    "pooled_logits",
]

STEMS = ("imagenet", "cifar")
NORMS = ("batch", "layer", "group", "none")

kernel_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
"""He initialisation by the outgoing connections, as He et al. train their ResNets."""


# Flax's pooling functions come without types.
max_pool: Callable[..., jax.Array] = nn.max_pool
_pool: Callable[..., jax.Array] = nn.pool


def halve(x: jax.Array) -> jax.Array:
    """Averages 2x2 pixels; a side of one pixel stays as it is.

    Args:
        x: [N, H, W, C].

    Returns:
        [N, max(H // 2, 1), max(W // 2, 1), C].

    Example:
        >>> halve(jnp.arange(4.0).reshape(1, 2, 2, 1)).tolist()
        [[[[1.5]]]]
    """
    side = tuple(min(2, length) for length in x.shape[1:3])
    return _pool(x, 0.0, jax.lax.add, side, side, "VALID") / math.prod(side)


def norm_layer(
    norm: str, train: bool, epsilon: float = 1e-5, dtype: Any = None
) -> Callable[..., Callable[[jax.Array], jax.Array]]:
    """A normalisation layer by name.

    Args:
        norm: `batch` (momentum 0.9), `layer` (over the channels), `group` (up to 8 channels a
            group) or `none`.
        train: whether BatchNorm normalises with the batch's statistics.
        epsilon: added to the variance.
        dtype: type to compute in; None takes the input's.

    Returns:
        A function `(name=...) -> layer`; the layer maps [..., C] to [..., C].

    Raises:
        ConfigError: there is no such layer.

    Example:
        >>> norm_layer("none", train=False)(name="norm")(jnp.ones(3)).tolist()
        [1.0, 1.0, 1.0]
    """
    check_option("norm", norm, NORMS)
    shared: dict[str, Any] = {"epsilon": epsilon, "dtype": dtype}
    if norm == "batch":
        return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, **shared)
    if norm == "layer":
        return partial(nn.LayerNorm, **shared)
    if norm == "group":
        group = partial(nn.GroupNorm, num_groups=None, **shared)
        return lambda name: lambda x: group(group_size=math.gcd(8, x.shape[-1]), name=name)(x)
    return lambda name: lambda x: x


def check_option(name: str, value: Any, choices: Collection[Any]) -> None:
    """Checks an option of a network that has few choices.

    Raises:
        ConfigError: it is none of them.

    Example:
        >>> check_option("stem", "cifar", STEMS)
    """
    if value not in choices:
        listed = ", ".join(map(str, choices))
        raise ConfigError(f"model.options.{name} is {value!r}: choose one of {listed}")


def conv(x: jax.Array, features: int, size: int, name: str, **options: Any) -> jax.Array:
    """A convolution with a square window, padded alike on both sides, without biases.

    To be called inside a compact Linen method.

    Args:
        x: features [N, H, W, C].
        features: channels of the result.
        size: of a side of the window.
        name: of the layer.
        **options: others of `flax.linen.Conv`. Padding "SAME" with a stride of 2 is uneven.
    """
    usual: dict[str, Any] = {"padding": size // 2, "use_bias": False, "kernel_init": kernel_init}
    return nn.Conv(features, (size, size), name=name, **(usual | options))(x)


def pooled_logits(x: jax.Array, num_classes: int) -> jax.Array:
    """The head of the convolutional networks: mean over the image, then a dense layer `head`.

    To be called inside a compact Linen method.

    Args:
        x: features [N, H, W, C].
        num_classes: number of logits.

    Returns:
        Logits, float32 [N, num_classes].
    """
    pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
    return nn.Dense(num_classes, name="head")(pooled)
