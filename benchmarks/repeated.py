"""What a second call costs: the first and further calls of what users call again and again.

    python benchmarks/repeated.py [--json FILE]

The network is that of M2N2's digits (an MLP 64-256-10, 1,437 examples). Further calls have other
parents, keys and data of the same shapes; `compiled` counts XLA's compilations in them.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import megajax as mj

EVOLUTION = mj.EvolutionConfig(population_size=40, generations=100, generations_per_chunk=100)
ALIGN = mj.AlignConfig(method="none")


def apply_fn(w: Any, x: jax.Array) -> jax.Array:
    """Two layers."""
    return jax.nn.relu(x @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]


def parent(seed: int) -> Any:
    """Random weights."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (64, 256), "b1": (256,), "w2": (256, 10), "b2": (10,)}
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def problem(seed: int) -> tuple[Any, list[Any], tuple[Any, Any]]:
    """A key, two parents and data."""
    rng = np.random.default_rng(seed)
    data = rng.uniform(size=(1437, 64)).astype(np.float32), rng.integers(0, 10, 1437)
    return jax.random.key(seed), [parent(2 * seed), parent(2 * seed + 1)], data


def merge(seed: int) -> Any:
    """A whole search: 40 individuals, 100 generations."""
    key, parents, data = problem(seed)
    return mj.merge(key, apply_fn, parents, data, align=ALIGN, evolution=EVOLUTION).fitness


def aligned(seed: int) -> Any:
    """The same, of parents that are aligned first."""
    key, parents, data = problem(seed)
    return mj.merge(key, apply_fn, parents, data, evolution=EVOLUTION).fitness


def baselines(seed: int) -> Any:
    """What needs no search."""
    key, parents, data = problem(seed)
    names = ("uniform_average", "slerp", "regmean", "line")
    config = mj.BaselinesConfig(names=names, budget=41)
    return mj.run_baselines(key, apply_fn, parents, data, calibration=data[0][:256], config=config)


def predict(seed: int) -> Any:
    """All predictions of one network."""
    _, parents, data = problem(seed)
    return mj.predict(apply_fn, parents[0], data[0])


def main() -> None:
    """Prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jnp.zeros(3).block_until_ready()
    compiled = [0]

    def count(name: str, *_: Any, **__: Any) -> None:
        compiled[0] += name == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    calls: dict[str, Callable[[int], Any]] = {
        "merge": merge,
        "merge, aligned": aligned,
        "run_baselines": baselines,
        "predict": predict,
    }
    found = {}
    for name, call in calls.items():
        times = []
        for seed in range(4):
            before, start = compiled[0], time.perf_counter()
            jax.block_until_ready(call(seed))
            times.append(time.perf_counter() - start)
            count_of_last = compiled[0] - before
        further = float(np.median(times[1:]))
        found[name] = {"first": times[0], "further": further, "compiled": count_of_last}
        print(f"{name:<16} first {times[0]:6.2f} s, further {further:6.2f} s, ", end="")
        print(f"compiled in the last one: {count_of_last}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
