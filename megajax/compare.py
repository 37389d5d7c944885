"""`python -m megajax.compare RUN RUN ...`: see `megajax.report.compare`."""

import sys

from megajax.report.compare import main as main

if __name__ == "__main__":
    sys.exit(main())
