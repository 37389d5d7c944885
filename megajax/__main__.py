"""The command `megajax`: one word for each command of the package, and what it is given.

    megajax run --config exp.py       train, merge, measure           python -m megajax.run
    megajax diagnose --config exp.py  whether its parents fit         python -m megajax.run.diagnose
    megajax compare RUN RUN           finished runs side by side      python -m megajax.compare
    megajax data prepare NAME         download an image set, once     python -m megajax.data

Each says more with --help; `megajax --version` says which release this is.
"""

import importlib
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
    word, *rest = sys.argv[1:] or ["--help"]
    if word in ("--version", "-V"):
        print(megajax.__version__)
    elif word in ("--help", "-h"):
        print(__doc__.rstrip())
    elif word in COMMANDS:
        sys.argv = [f"megajax {word}", *rest]
        return importlib.import_module(COMMANDS[word]).main()
    else:
        print(f"error: {word!r} is no command; see megajax --help", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
