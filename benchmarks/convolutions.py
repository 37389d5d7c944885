"""What a CPU makes of narrow convolutions: as they are, several pixels at once, as patches.

    python benchmarks/convolutions.py [--side 32] [--images 512] [--channels 16:16 32:32]
    taskset -c 0 python benchmarks/convolutions.py --images 48     # on one core, in its caches

3x3 convolutions with 1 to 32 channels in and 4 to 64 out, each with a kernel of its own for each of
two networks, one network after the other, on as many images as have half a million pixels. GFLOP/s
of the useful operations; `chosen` is what `megajax.program.convolutions` does where all cores share
a device, `one core` what it does where each is one. `winograd` is F(2, 3), sixteen matrix products.
`grouped` is what `vmap` over kernels makes of the two networks. Medians of synchronised runs.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import seconds

from megajax.program.convolutions import NARROW_ON_ONE_CORE
from megajax.program.folding import widened

LAYOUT = ("NHWC", "HWIO", "NHWC")
CHANNELS = [f"{before}:{after}" for before in (1, 3, 8, 16, 32) for after in (4, 8, 16, 32, 64)]


def plain(w: jax.Array, x: jax.Array) -> jax.Array:
    """The convolution as it is."""
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=LAYOUT)


def patches(w: jax.Array, x: jax.Array) -> jax.Array:
    """Patches gathered by hand, and one matrix product."""
    n, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    columns = jnp.concatenate(shifted, axis=-1).reshape(-1, 9 * channels)
    return (columns @ w.reshape(9 * channels, -1)).reshape(n, height, width, -1)


def winograd(w: jax.Array, x: jax.Array) -> jax.Array:
    """F(2x2, 3x3) of Lavin and Gray, arXiv 1509.09308: 16 products where a tile takes 36."""
    n, height, width, _ = x.shape
    ends = jnp.asarray([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], w.dtype)
    kernels = jnp.einsum("ai,bj,ijco->abco", ends, ends, w)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def four(parts: list[jax.Array]) -> list[jax.Array]:
        a, b, c, d = parts
        return [a - c, b + c, c - b, b - d]

    def two(parts: list[jax.Array]) -> list[jax.Array]:
        a, b, c, d = parts
        return [a + b + c, b - c - d]

    rows = four([x[:, i : i + height - 1 : 2] for i in range(4)])
    tiles = [four([row[:, :, j : j + width - 1 : 2] for j in range(4)]) for row in rows]
    made = [[tiles[i][j] @ kernels[i, j] for j in range(4)] for i in range(4)]
    across = [two(row) for row in made]
    sides = [jnp.stack(two([row[j] for row in across]), 2) for j in range(2)]
    return jnp.stack(sides, 4).reshape(n, height, width, -1)


def rates(side: int, images: int, channels_in: int, channels_out: int) -> dict[str, float]:
    """GFLOP/s by each way."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(images, side, side, channels_in)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(2, 3, 3, channels_in, channels_out)), jnp.float32)
    operations = 2 * 2 * 9 * images * side**2 * channels_in * channels_out

    def of_two(function: Callable[..., Any]) -> Callable[..., Any]:
        def pooled(w: jax.Array, x: jax.Array) -> jax.Array:
            return jax.nn.relu(function(w, x)).sum((1, 2))

        return lambda kernels, x: lax.map(lambda w: pooled(w, x), kernels)

    def grouped(kernels: jax.Array, x: jax.Array) -> jax.Array:
        two = jnp.stack([x, x + 1])  # in a network the inputs of a layer differ too
        return jax.nn.relu(jax.vmap(plain)(kernels, two)).sum((2, 3))

    ways = {
        "plain": of_two(plain),
        "chosen": of_two(widened(plain)),
        "one core": of_two(widened(plain, NARROW_ON_ONE_CORE)),
        "winograd": of_two(winograd),
        "patches": of_two(patches),
        "grouped": grouped,
    }
    return {
        name: operations / seconds(jax.jit(way), kernels, x) / 1e9 for name, way in ways.items()
    }


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--images", type=int, help="default: as many as have half a million pixels")
    parser.add_argument("--channels", nargs="+", default=CHANNELS, metavar="IN:OUT")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {options.side}x{options.side} pixels, GFLOP/s")
    images = options.images or 2**19 // options.side**2
    table: list[dict[str, Any]] = []
    for channels in options.channels:
        row = rates(options.side, images, *map(int, channels.split(":")))
        if not table:
            print("| channels |", " | ".join(row), "|")
            print("| --- |", " | ".join(["---"] * len(row)), "|")
        table.append({"channels": channels, **row})
        cells = " | ".join(f"{rate:.0f}" for rate in row.values())
        print(f"| {channels} | {cells} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
