"""The command `megajax`, followed by what to do.

    megajax run --config exp.py       train, merge, measure           python -m megajax.run
    megajax diagnose --config exp.py  do the parents fit together?    python -m megajax.run.diagnose
    megajax compare RUN RUN           finished runs side by side      python -m megajax.compare
    megajax data prepare NAME         download an image set, once     python -m megajax.data

Each of them explains itself with --help; `megajax --version` prints the version.
"""

import importlib
import os
import signal
import sys

import megajax

COMMANDS = {
    "run": "megajax.run.__main__",
    "diagnose": "megajax.run.diagnose",
    "compare": "megajax.compare",
    "data": "megajax.data",
}


def main() -> int:
    """Runs a command; its exit code is ours."""
    try:
        code = _command(*(sys.argv[1:] or ["--help"]))
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _command(word: str, *rest: str) -> int:
    if word in ("--version", "-V"):
        print(megajax.__version__)
    elif word in ("--help", "-h"):
        print(__doc__.rstrip())
    elif word in COMMANDS:
        sys.argv = [f"megajax {word}", *rest]
        return importlib.import_module(COMMANDS[word]).main()
    else:
        print(f"error: {word!r} is not a command; see megajax --help", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
