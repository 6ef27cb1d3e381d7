"""The command `glazoo`, also as `python -m glazoo`."""

from __future__ import annotations

import sys

from glazoo.errors import extra

__all__ = ["main"]


def main() -> None:
    """Run the command line; where the extra `cli` is missing, say so in one line, exit code 2."""
    try:
        with extra("cli"):
            from glazoo.cli import main as run
    except ImportError as e:
        print(f"glazoo: {e}", file=sys.stderr)
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
