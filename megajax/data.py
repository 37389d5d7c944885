"""`python -m megajax.data`: see `megajax.zoo.data`."""

import sys

from megajax.zoo.data import main as main

if __name__ == "__main__":
    sys.exit(main())
