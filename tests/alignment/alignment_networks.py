"""Networks that the zoo does not have, and an NNX build of one that it has."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Flax 0.12.1 does not know how JAX 0.10 spells it.
REMAT = nn.remat if flax.__version__ != "0.12.1" else lambda module: module


class SqueezeExcite(nn.Module):
    """Depthwise-separable convolutions, each followed by squeeze-and-excite."""

    @nn.compact
    def __call__(self, x):
        x = nn.swish(nn.Conv(8, (3, 3))(x))
        for features in (8, 12):
            x = nn.Conv(x.shape[-1], (3, 3), feature_group_count=x.shape[-1])(x)
            x = nn.swish(nn.BatchNorm(use_running_average=True)(x))
            s = nn.relu(nn.Dense(4)(x.mean((1, 2), keepdims=True)))
            x = x * nn.sigmoid(nn.Dense(x.shape[-1])(s))
            x = nn.Conv(features, (1, 1))(x)
        return nn.Dense(3)(x.mean((1, 2)))


class Transformer(nn.Module):
    """A vision transformer: patches, position and class embeddings, attention and MLP blocks."""

    depth: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (4, 4), (4, 4))(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("token", nn.initializers.normal(), (1, 1, 12))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(), (1, *x.shape[1:]))
        for i in range(self.depth):
            attention = REMAT(nn.MultiHeadDotProductAttention)(num_heads=3, name=f"attention{i}")
            x = x + attention(nn.LayerNorm()(x))
            x = x + nn.Dense(12)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


class PackedAttention(nn.Module):
    """Attention whose query, key and value come from one projection, cut by slices."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        packed = nn.Dense(24)(x).reshape(*x.shape[:2], 3, 2, 4)
        query, key, value = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
        weights = nn.softmax(jnp.einsum("bthd,bshd->bhts", query, key))
        out = jnp.einsum("bhts,bshd->bthd", weights, value)
        return nn.Dense(3)((x + nn.Dense(8)(out.reshape(*x.shape))).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer over time (a `lax.scan`), read out from all its steps."""

    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell(6))(nn.relu(nn.Dense(5)(x)))
        return nn.Dense(3)(x.mean(1))


class Grouped(nn.Module):
    """A ResNeXt block: grouped convolution and GroupNorm with the same groups."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (1, 1))(x))
        x = nn.Conv(12, (3, 3), feature_group_count=3)(x)
        x = nn.relu(nn.GroupNorm(3)(x))
        return nn.Dense(3)(x.mean((1, 2)))


class Stacked(nn.Module):
    """Residual blocks under one `lax.scan`, their weights stacked along a layer axis."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(6)(nn.relu(nn.Dense(9)(x))), None

        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(3)(blocks()(nn.Dense(6)(x), None)[0])


class NnxBlock(nnx.Module):
    def __init__(self, features, stride, channels, rngs):
        options = {"use_bias": False, "rngs": rngs}
        self.conv1 = nnx.Conv(channels, features, (3, 3), strides=stride, **options)
        self.norm1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv2 = nnx.Conv(features, features, (3, 3), **options)
        self.norm2 = nnx.BatchNorm(features, rngs=rngs)
        self.shortcut = (
            nnx.Conv(channels, features, (1, 1), strides=stride, **options) if stride > 1 else None
        )

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NnxResNet(nnx.Module):
    """ResNet-8 with BatchNorm, as in the zoo."""

    def __init__(self, width, rngs):
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.stages = nnx.List(
            [
                NnxBlock(width, 1, width, rngs),
                NnxBlock(2 * width, 2, width, rngs),
                NnxBlock(4 * width, 2, 2 * width, rngs),
            ]
        )
        self.head = nnx.Linear(4 * width, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.stages:
            x = block(x)
        return self.head(x.mean((1, 2)))


def random_variables(shapes, seed=0):
    """Variables of the given shapes, drawn without compiling an initializer."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in ("scale", "var"):
            return np.exp(np.float32(0.3) * noise)
        return noise / np.float32(max(1, np.prod(leaf.shape[:-1])) ** 0.5)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def linen(module, shape):
    """(apply_fn, variables, inputs) of a Linen module."""
    inputs = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return module.apply, random_variables(shapes), inputs


def nnx_resnet():
    """(apply_fn, variables, inputs) of an NNX module: its variables are a pure dict."""
    model = nnx.eval_shape(lambda: NnxResNet(4, nnx.Rngs(0)))
    model.eval()
    graph, state = nnx.split(model)
    variables = random_variables(nnx.to_pure_dict(state))

    def apply_fn(variables, inputs):
        return nnx.merge(graph, variables)(inputs)

    return apply_fn, variables, np.ones((2, 8, 8, 3), np.float32)
