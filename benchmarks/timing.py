"""What the benchmarks measure with: the median of synchronised runs."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

LONG = 20.0


def seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 7) -> float:
    """Median time, the first run apart; if that alone takes very long, its time."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    first = time.perf_counter() - start
    if first > LONG:
        return first
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_in_a_loop(
    function: Callable[[jax.Array, Any], Any], start: Any, *, times: int = 5
) -> float:
    """Time of `carry = function(i, carry)` in a program that repeats it, as a search does.

    By itself, each call would have new memory for its result, which takes longer to be got from
    the system than to be written. The loop's memory is there already.
    """

    def again(i: jax.Array, carry: Any) -> Any:
        return jax.lax.optimization_barrier(function(i, carry))

    loop = jax.jit(lambda carry: jax.lax.fori_loop(0, times, again, carry), donate_argnums=0)
    carry = [jax.tree.map(jnp.copy, start)]

    def run() -> Any:
        carry[0] = loop(carry[0])
        return carry[0]

    return seconds(run, repeats=3) / times


@partial(jax.jit, static_argnums=0)
def score_one(
    apply_fn: Any, share: Any, first: Any, second: Any, images: Any, labels: Any
) -> jax.Array:
    """How many images a network on the line between two is right on: what a user would jit.

    Images and labels are cut into batches `[B, b, ...]`.
    """
    network = jax.tree.map(lambda a, b: (1 - share) * a + share * b, first, second)

    def right(batch: Any) -> Any:
        return (jnp.argmax(apply_fn(network, batch[0]), -1) == batch[1]).sum()

    return jax.lax.map(right, (images, labels)).sum()


def copy_rate() -> float:
    """Bytes a second that a large copy reads and writes."""
    large = jnp.ones(2**26, jnp.float32)
    return 2 * large.nbytes / seconds_in_a_loop(lambda _, x: x + 1, large)
