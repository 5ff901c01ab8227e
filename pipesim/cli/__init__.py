"""The command line: ``pipesim.cli:main``."""

import sys


def main() -> None:
    """Entry point of the ``pipesim`` command. Ctrl-C ends it without a traceback, also while modules are imported."""
    try:
        from pipesim.cli.commands import app

        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
