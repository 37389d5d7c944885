"""`python -m megajax.run`: see `megajax.run.cli`."""

import sys

from megajax.run.cli import main, make_cores_devices

if __name__ == "__main__":
    make_cores_devices()
    sys.exit(main())
