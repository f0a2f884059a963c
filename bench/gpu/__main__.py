"""``python -m bench.gpu`` is ``suite.py``."""

import sys

from bench.gpu.suite import main

if __name__ == "__main__":
    sys.exit(main())
