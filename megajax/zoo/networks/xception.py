"""Xception (Chollet, arXiv 1610.02357): depthwise separable convolutions with residuals.

Example:
    >>> import jax, jax.numpy as jnp
    >>> model = Xception(num_classes=10)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables)) - (2048 + 1) * 10
    20861480
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from megajax.zoo.networks import layers
from megajax.zoo.networks.layers import STEMS, check_option, max_pool, norm_layer, pooled_logits

__all__ = ["Xception"]


class Xception(nn.Module):
    """Entry flow, `middle` residual blocks, exit flow.

    Attributes:
        num_classes: number of logits.
        width: channels of the first convolution (32 as published); all others follow in proportion.
        middle: blocks of the middle flow.
        stem: `imagenet` (two unpadded convolutions, the first with stride 2) or `cifar` (both
            padded, no stride).
        norm: normalisation after each convolution: `batch`, `layer`, `group` or `none`.
        dtype: type to compute in; None is float32.
    """

    num_classes: int
    width: int = 32
    middle: int = 8
    stem: str = "imagenet"
    norm: str = "batch"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [N, H, W, C] to logits, float32 [N, num_classes].

        Raises:
            ConfigError: there is no such stem or no such normalisation.
        """
        check_option("stem", self.stem, STEMS)
        norm = norm_layer(self.norm, train, epsilon=1e-3, dtype=self.dtype)

        def conv(x: jax.Array, features: int, size: int, name: str, **options: Any) -> jax.Array:
            options = {"padding": "SAME", "dtype": self.dtype} | options
            return norm(name=f"{name}_norm")(layers.conv(x, features, size, name, **options))

        def separable(x: jax.Array, features: int, name: str) -> jax.Array:
            x = nn.Conv(
                x.shape[-1],
                (3, 3),
                feature_group_count=x.shape[-1],
                use_bias=False,
                dtype=self.dtype,
                name=f"{name}_depthwise",
            )(x)
            return conv(x, features, 1, name)

        def pool(x: jax.Array) -> jax.Array:
            return max_pool(x, (3, 3), strides=(2, 2), padding="SAME")

        def channels(published: int) -> int:
            return published * self.width // 32

        cifar = self.stem == "cifar"
        pad = "SAME" if cifar else "VALID"
        x = nn.relu(conv(x, channels(32), 3, "stem1", strides=1 if cifar else 2, padding=pad))
        x = nn.relu(conv(x, channels(64), 3, "stem2", padding=pad))
        for i, features in enumerate((128, 256, 728)):
            residual = conv(x, channels(features), 1, f"entry{i + 1}_shortcut", strides=2)
            x = nn.relu(x) if i > 0 else x
            x = separable(x, channels(features), f"entry{i + 1}_separable1")
            x = separable(nn.relu(x), channels(features), f"entry{i + 1}_separable2")
            x = pool(x) + residual
        for i in range(self.middle):
            residual = x
            for j in range(3):
                x = separable(nn.relu(x), channels(728), f"middle{i + 1}_separable{j + 1}")
            x = x + residual
        residual = conv(x, channels(1024), 1, "exit_shortcut", strides=2)
        x = separable(nn.relu(x), channels(728), "exit_separable1")
        x = separable(nn.relu(x), channels(1024), "exit_separable2")
        x = pool(x) + residual
        x = nn.relu(separable(x, channels(1536), "exit_separable3"))
        x = nn.relu(separable(x, channels(2048), "exit_separable4"))
        return pooled_logits(x, self.num_classes)
