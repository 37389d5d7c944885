"""Says whether the parents of a run fit together, and which method of merging suits them.

    python -m megajax.run.diagnose --config experiments/digits.py
    python -m megajax.run.diagnose --config exp.py --workdir DIR

The parents are trained, or loaded, into the workdir of the run; a `megajax.run` with the same flags
takes them from there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from megajax.merging.diagnosis import diagnose
from megajax.run import cli, pipeline
from megajax.run import processes as distributed
from megajax.run.stages.task import stream

__all__ = ["main"]


def main() -> int:
    """The command."""
    cli.make_cores_devices()
    return cli.main(do=_diagnose, about=__doc__)


def _diagnose(order: Any, stopping: Callable[[], bool]) -> None:
    console = Console(quiet=not distributed.is_first(), soft_wrap=True, highlight=False)
    for run in order.runs:
        task, parents = pipeline.parents_of(run.config, run.folder, console, stopping=stopping)
        split = task.dataset.validation
        found = diagnose(
            stream(run.config, "align"),
            task.apply_fn,
            parents,
            (split.images, split.labels),
            calibration=task.dataset.train.images,
        )
        console.print(f"{run.label}\n{found}".strip(), markup=False)


if __name__ == "__main__":
    sys.exit(main())
