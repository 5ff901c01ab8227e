"""The application with all its commands."""

from pipesim.cli import fidelity, real, simulate, sweep  # noqa: F401  (importing them registers their commands)
from pipesim.cli.common import app

__all__ = ["app"]
