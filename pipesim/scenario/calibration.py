"""Where measured costs in a scenario come from, and how far they can be trusted."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipesim.scenario.section import Section


class Calibration(Section):
    """The evidence that `pipesim calibrate` writes beside the costs that it measured."""

    format: Literal["pipesim-profile-1"]
    date: str
    """When it was measured: ISO 8601, UTC."""
    machine: str
    """Where the head ran."""
    how: str
    """What was measured, in words."""
    rounds: int = Field(ge=1)
    """How often everything was measured, in turns."""
    intervals: dict[str, Annotated[tuple[float, float], Field(strict=False)]] = Field(default_factory=dict)
    """95 % confidence limits by dotted key of this file: the interval of a prediction follows from them."""
    residuals: dict[str, float] = Field(default_factory=dict)
    """Root mean square of the relative errors of each fit."""


CalibrationSource = Annotated[
    Calibration | Annotated[Path, Field(strict=False)] | None, Field(union_mode="left_to_right")
]
"""The evidence itself, or the file that has it, relative to the scenario file."""
