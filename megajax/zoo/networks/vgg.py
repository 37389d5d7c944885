"""VGG networks (Simonyan and Zisserman, arXiv 1409.1556): 3x3 convolutions and max pooling.

The convolutions are the published ones; one dense layer on the pooled features takes the place of
the three that suit 224x224 images.

Example:
    >>> import jax, jax.numpy as jnp
    >>> model = VGG(num_classes=10, depth=16)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables)) - (512 + 1) * 10
    14714688
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from megajax.zoo.networks.layers import check_option, conv, max_pool, norm_layer, pooled_logits

__all__ = ["VGG"]

CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five blocks of 1, 2, 4, 8 and 8 times `width` channels, each followed by max pooling.

    Attributes:
        num_classes: number of logits.
        depth: 11, 13, 16 or 19.
        width: channels of the first block.
        norm: normalisation after each convolution: `none` (as published), `batch`, `layer` or
            `group`.
        dtype: type to compute in; None is float32.
    """

    num_classes: int
    depth: int = 16
    width: int = 64
    norm: str = "none"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [N, H, W, C] to logits, float32 [N, num_classes].

        Raises:
            ConfigError: there is no VGG of this depth, or no such normalisation.
        """
        check_option("depth", self.depth, CONVOLUTIONS)
        norm = norm_layer(self.norm, train, dtype=self.dtype)
        for block, count in enumerate(CONVOLUTIONS[self.depth]):
            for i in range(count):
                name = f"block{block + 1}_{{}}{i + 1}"
                width = self.width * min(2**block, 8)
                x = conv(x, width, 3, name.format("conv"), use_bias=True, dtype=self.dtype)
                x = nn.relu(norm(name=name.format("norm"))(x))
            # "SAME" is the published pooling at even sides, and lets images be smaller than 32.
            x = max_pool(x, (2, 2), strides=(2, 2), padding="SAME")
        return pooled_logits(x, self.num_classes)
