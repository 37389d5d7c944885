"""DenseNets (Huang et al., arXiv 1608.06993), bottlenecked and compressed.

Example:
    >>> import jax, jax.numpy as jnp
    >>> model = DenseNet(num_classes=10, blocks=(1, 1), growth=4, stem="cifar")
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> variables["params"]["head"]["kernel"].shape
    (10, 10)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.zoo.networks import layers
from megajax.zoo.networks.layers import (
    STEMS,
    check_option,
    halve,
    max_pool,
    norm_layer,
    pooled_logits,
)

__all__ = ["DenseNet"]

BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}


class DenseNet(nn.Module):
    """Dense blocks whose layers each add `growth` channels, with halving transitions between them.

    Attributes:
        num_classes: number of logits.
        depth: 121, 169 or 201; sets the number of layers in each dense block.
        blocks: those numbers themselves, in place of `depth`'s.
        growth: channels that a layer adds; the stem has twice as many.
        stem: `imagenet` (7x7 with stride 2, max pooling) or `cifar` (3x3).
        norm: normalisation before each ReLU: `batch`, `layer`, `group` or `none`.
        dtype: type to compute in; None is float32.
    """

    num_classes: int
    depth: int = 121
    blocks: Sequence[int] | None = None
    growth: int = 32
    stem: str = "imagenet"
    norm: str = "batch"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [N, H, W, C] to logits, float32 [N, num_classes].

        Raises:
            ConfigError: there is no DenseNet of this depth, no such stem or no such normalisation.
        """
        if self.blocks is None:
            check_option("depth", self.depth, BLOCKS)
        check_option("stem", self.stem, STEMS)
        norm = norm_layer(self.norm, train, epsilon=1.001e-5, dtype=self.dtype)
        conv = partial(layers.conv, dtype=self.dtype)
        if self.stem == "imagenet":
            x = conv(x, 2 * self.growth, 7, "stem_conv", strides=2)
            x = nn.relu(norm(name="stem_norm")(x))
            x = max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        else:
            x = nn.relu(norm(name="stem_norm")(conv(x, 2 * self.growth, 3, "stem_conv")))

        for b, count in enumerate(self.blocks or BLOCKS[self.depth]):
            if b > 0:
                x = nn.relu(norm(name=f"transition{b}_norm")(x))
                x = halve(conv(x, x.shape[-1] // 2, 1, f"transition{b}_conv"))
            for i in range(count):
                name = f"block{b + 1}_layer{i + 1}"
                y = nn.relu(norm(name=f"{name}_norm1")(x))
                y = conv(y, 4 * self.growth, 1, f"{name}_conv1")
                y = nn.relu(norm(name=f"{name}_norm2")(y))
                y = conv(y, self.growth, 3, f"{name}_conv2")
                x = jnp.concatenate([x, y], axis=-1)
        return pooled_logits(nn.relu(norm(name="final_norm")(x)), self.num_classes)
