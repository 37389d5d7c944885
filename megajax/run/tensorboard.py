"""The lines of `metrics.jsonl` for TensorBoard, under the same names.

Needs tensorboardX, which is the optional extra `tensorboard`, and nothing of TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megajax.errors import ConfigError
from megajax.io import faults_of

__all__ = ["require_tensorboard", "write_tensorboard"]


def require_tensorboard() -> Any:
    """The package, imported; ask for it before a run, not after.

    Raises:
        ConfigError: it is not installed; says how to install it.
    """
    try:
        import tensorboardX
    except ImportError:
        raise ConfigError(
            'tensorboard is True: that needs tensorboardX: pip install -e ".[tensorboard]"'
        ) from None
    return tensorboardX


def write_tensorboard(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes one event file with a scalar for each number of each line.

    Args:
        folder: made if need be; `tensorboard --logdir` reads it. Every call adds a file, so write
            all lines at once, or each line once.
        lines: of `metrics.jsonl`; the step is a line's `generation`. What is no number, or null, is
            left out.

    Raises:
        ConfigError: tensorboardX is not installed.
        WorkdirError: the folder cannot be written.
    """
    package = require_tensorboard()
    with faults_of(folder, "written"), package.SummaryWriter(str(folder)) as writer:
        for line in lines:
            for name, value in line.items():
                if name != "generation" and _is_number(value):
                    writer.add_scalar(name, value, global_step=line["generation"])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
