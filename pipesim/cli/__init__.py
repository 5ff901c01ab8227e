"""The command line: ``pipesim.cli:main``."""

from pipesim.cli import fidelity, real, simulate, sweep  # noqa: F401  (importing them registers their commands)
from pipesim.cli.common import app


def main() -> None:
    """Entry point of the ``pipesim`` command."""
    app()
