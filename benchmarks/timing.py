"""What the benchmarks measure with: the median of synchronised runs."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

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
