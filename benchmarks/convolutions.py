"""What a CPU makes of narrow convolutions: as they are, several pixels at once, as patches.

    python benchmarks/convolutions.py [--side 32] [--json FILE]

3x3 convolutions with 1 to 32 channels in and 4 to 64 out, each with a kernel of its own for each of
two networks, one network after the other, on as many images as have half a million pixels. GFLOP/s
of the useful operations; `chosen` is what `megajax.program.convolutions` does. `grouped` is what
`vmap` over kernels makes of the two networks. Medians of synchronised runs.
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

from megajax.program.folding import widened

LAYOUT = ("NHWC", "HWIO", "NHWC")


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


def rates(side: int, channels_in: int, channels_out: int) -> dict[str, float]:
    """GFLOP/s by each way."""
    rng = np.random.default_rng(0)
    images = 2**19 // side**2
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {options.side}x{options.side} pixels, GFLOP/s")
    print("| channels | plain | chosen | patches | grouped |\n| --- | --- | --- | --- | --- |")
    table = []
    for channels_in in (1, 3, 8, 16, 32):
        for channels_out in (4, 8, 16, 32, 64):
            row = rates(options.side, channels_in, channels_out)
            table.append({"in": channels_in, "out": channels_out, **row})
            cells = " | ".join(f"{rate:.0f}" for rate in row.values())
            print(f"| {channels_in} -> {channels_out} | {cells} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
