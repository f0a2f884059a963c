"""``python -m bench.kernels`` is the compile report."""

import sys

from bench.kernels.compile_report import main

if __name__ == "__main__":
    sys.exit(main())
