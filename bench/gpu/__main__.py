"""``python -m bench.gpu first | second`` are ``first.py`` and ``second.py``; without either it is ``suite.py``, part by part."""

import sys

from bench.gpu import first, second, suite

if __name__ == "__main__":
    command = {"first": first.main, "second": second.main}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    sys.exit(command(sys.argv[2:]) if command else suite.main())
