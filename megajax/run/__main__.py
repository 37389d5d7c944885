"""`python -m megajax.run`: see `megajax.run.cli`."""

import sys

from megajax.run import cli


def main() -> int:
    """The command, with a device for each core."""
    cli.make_cores_devices()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
