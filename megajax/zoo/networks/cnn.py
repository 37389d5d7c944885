"""A small convolutional network: three convolutions, at home on 8x8 digits as on 32x32 images.

Example:
    >>> import jax, jax.numpy as jnp
    >>> model = CNN(num_classes=10)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    24058
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn

from megajax.zoo.networks.layers import conv, norm_layer, pooled_logits

__all__ = ["CNN"]


class CNN(nn.Module):
    """Three 3x3 convolutions of 1, 2 and 4 times `width` channels, the later two with stride 2.

    Attributes:
        num_classes: number of logits.
        width: channels of the first convolution.
        norm: normalisation after each convolution: `batch`, `layer`, `group` or `none`.
        dtype: type to compute in; None is float32.
    """

    num_classes: int
    width: int = 16
    norm: str = "batch"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [N, H, W, C] to logits, float32 [N, num_classes]."""
        norm = norm_layer(self.norm, train, dtype=self.dtype)
        for i, stride in enumerate((1, 2, 2)):
            width, bias = self.width * 2**i, self.norm == "none"
            x = conv(x, width, 3, f"conv{i + 1}", strides=stride, use_bias=bias, dtype=self.dtype)
            x = nn.relu(norm(name=f"norm{i + 1}")(x))
        return pooled_logits(x, self.num_classes)
