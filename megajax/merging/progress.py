"""How far a search is, for whoever waits for it. Knows what a search tells after each call."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from megajax.search.loop import Info

__all__ = ["ProgressLine"]

_QUIET = 60.0  # seconds between two lines where there is no terminal


class ProgressLine:
    """A line on a terminal that is written anew; elsewhere a line a minute, and one at the end.

    Args:
        generations: how many there are to be.
        stream: where to write; None is the standard error.

    Example:
        >>> import numpy as np
        >>> line = ProgressLine(60, stream=sys.stdout)
        >>> numbers = {name: np.zeros(1) for name in Info._fields}
        >>> line.show(Info(**{**numbers, "generation": np.array([7]), "best_ever": np.array([-1])}))
        >>> line.close()
        generation 7 of 60, fitness -1
    """

    def __init__(self, generations: int, stream: TextIO | None = None) -> None:
        self._generations = generations
        self._stream = sys.stderr if stream is None else stream
        self._said = time.monotonic()
        self._text = ""

    def show(self, info: Info) -> None:
        """Says what the last of some generations was."""
        number, best = int(info.generation[-1]), float(info.best_ever[-1])
        self._text = f"generation {number} of {self._generations}, fitness {best:.4g}"
        if self._stream.isatty():
            print(f"\r{self._text}\x1b[K", end="", file=self._stream, flush=True)
        elif time.monotonic() - self._said >= _QUIET:
            self._said = time.monotonic()
            print(self._text, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the line, or says the last one."""
        print("" if self._stream.isatty() else self._text, file=self._stream, flush=True)
