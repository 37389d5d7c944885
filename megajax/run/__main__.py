"""`python -m megajax.run`: see `megajax.run.cli`."""

import signal
import sys


def start() -> int:
    """Runs the command; Ctrl-C ends it quietly, whether it comes while it loads or ends."""
    try:
        from megajax.run.cli import main, make_cores_devices

        make_cores_devices()
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    return code


if __name__ == "__main__":
    sys.exit(start())
