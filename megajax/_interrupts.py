"""What Ctrl-C does while a command of this package loads or ends; see `end_at_once`."""

import os
import signal
import sys
from types import FrameType


def end_at_once() -> None:
    """Lets Ctrl-C end the process in one line, if it is one of this package's commands.

    Nothing is lost while a command loads or ends. At work it has handlers of its own. Every other
    program, which only imports the package, keeps its own behaviour.
    """
    words = [*sys.orig_argv, ""]
    module = words[words.index("-m") + 1] if "-m" in words else ""
    ours = module.partition(".")[0] == "megajax" or os.path.basename(sys.argv[0]) == "megajax"
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
