"""Several runs that differ in their seed, as one: mean and spread of every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["aggregate"]


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of the networks' figures over the seeds.

    Args:
        results: the contents of `results.json` of the runs.

    Returns:
        The results by seed, and for the merged network and each baseline, figure by figure, the
        `mean` and the sample standard deviation `std` (None for a single seed).

    Example:
        >>> runs = [
        ...     {"seed": seed, "merged": {"test_accuracy": value}, "baselines": {}}
        ...     for seed, value in ((0, 0.5), (1, 0.7))
        ... ]
        >>> summary = aggregate(runs)
        >>> round(summary["mean"]["merged"]["test_accuracy"], 3)
        0.6
        >>> round(summary["std"]["merged"]["test_accuracy"], 3)
        0.141
    """
    networks = [{"merged": run["merged"], **run["baselines"]} for run in results]

    def over_seeds(statistic: Any) -> dict[str, dict[str, float | None]]:
        return {
            name: {figure: statistic([run[name][figure] for run in networks]) for figure in figures}
            for name, figures in networks[0].items()
        }

    return {
        "seeds": [run["seed"] for run in results],
        "mean": over_seeds(lambda values: float(np.mean(values))),
        "std": over_seeds(lambda values: float(np.std(values, ddof=1)) if values[1:] else None),
        "runs": list(results),
    }
