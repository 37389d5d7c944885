"""A multilayer perceptron.

Example:
    >>> import jax, jax.numpy as jnp
    >>> model = MLP(num_classes=10, hidden=(32,))
    >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> jax.tree.map(jnp.shape, variables["params"]["dense1"])
    {'bias': (32,), 'kernel': (64, 32)}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from megajax.zoo.networks.layers import norm_layer

__all__ = ["MLP"]


class MLP(nn.Module):
    """Dense layers with ReLU on the flattened image.

    Attributes:
        num_classes: number of logits.
        hidden: units of each hidden layer.
        norm: normalisation before each ReLU: `none`, `batch`, `layer` or `group`.
        dtype: type to compute in; None is float32.
    """

    num_classes: int
    hidden: Sequence[int] = (256, 256)
    norm: str = "none"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs [N, ...] to logits, float32 [N, num_classes]."""
        norm = norm_layer(self.norm, train, dtype=self.dtype)
        x = x.reshape(len(x), -1)
        for i, units in enumerate(self.hidden):
            x = nn.Dense(units, dtype=self.dtype, name=f"dense{i + 1}")(x)
            x = nn.relu(norm(name=f"norm{i + 1}")(x))
        return nn.Dense(self.num_classes, name="head")(x.astype(jnp.float32))
