"""ResNets for small images (He et al., "Deep Residual Learning", arXiv 1512.03385, section 4.2).

Three stages of basic blocks with `width`, 2 `width` and 4 `width` channels; 6n+2 layers have n
blocks a stage. Depth 152 is the one that MeGA (arXiv 2406.04607) calls so: 18, 37 and 37 blocks.

Example:
    >>> import jax, jax.numpy as jnp
    >>> model = ResNet(num_classes=10, depth=20, projection=False)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    >>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    269722
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.errors import ConfigError
from megajax.zoo.networks import layers
from megajax.zoo.networks.layers import norm_layer, pooled_logits

__all__ = ["ResNet"]


class ResNet(nn.Module):
    """A CIFAR-style residual network, after the normalisation of the basic blocks.

    Attributes:
        num_classes: number of logits.
        depth: 6n+2 for n blocks in each stage (8, 20, 32, 44, 56, 110, ...), or 152.
        width: channels of the first stage.
        norm: normalisation after each convolution: `batch`, `layer`, `group` or `none`.
        conv_bias: whether the convolutions have biases.
        projection: shortcuts that change shape are 1x1 convolutions with normalisation; otherwise
            they have no parameters (every second pixel, zeros for the new channels).
        dtype: type to compute in; None is float32.
    """

    num_classes: int
    depth: int = 20
    width: int = 16
    norm: str = "batch"
    conv_bias: bool = False
    projection: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images [N, H, W, C] to logits, float32 [N, num_classes].

        Raises:
            ConfigError: there is no ResNet of this depth, or no such normalisation.
        """
        norm = norm_layer(self.norm, train, dtype=self.dtype)
        conv = partial(layers.conv, use_bias=self.conv_bias, dtype=self.dtype)

        def shortcut(x: jax.Array, features: int, stride: int, name: str) -> jax.Array:
            if x.shape[-1] == features and stride == 1:
                return x
            if self.projection:
                x = conv(x, features, 1, f"{name}_shortcut", strides=stride)
                return norm(name=f"{name}_shortcut_norm")(x)
            new = features - x.shape[-1]
            return jnp.pad(
                x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))
            )

        def block(x: jax.Array, features: int, stride: int, name: str) -> jax.Array:
            y = conv(x, features, 3, f"{name}_conv1", strides=stride)
            y = nn.relu(norm(name=f"{name}_norm1")(y))
            y = conv(y, features, 3, f"{name}_conv2")
            y = norm(name=f"{name}_norm2")(y)
            return nn.relu(y + shortcut(x, features, stride, name))

        x = nn.relu(norm(name="stem_norm")(conv(x, self.width, 3, "stem_conv")))
        for stage, blocks in enumerate(_blocks(self.depth)):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                x = block(x, self.width * 2**stage, stride, f"stage{stage + 1}_block{i + 1}")
        return pooled_logits(x, self.num_classes)


def _blocks(depth: int) -> tuple[int, int, int]:
    if depth == 152:
        return (18, 37, 37)
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise ConfigError(f"model.options.depth is {depth!r}: a ResNet has 6n+2 layers, or 152")
    return (n, n, n)
