"""From measurements of a running pipeline to a profile that scenarios can name: observe, fit, write."""

from pipesim.calibration.fitting import Fit, fit_costs
from pipesim.calibration.observations import DraftSample, FloodSample, HeadSample, Observations, RunSample
from pipesim.calibration.profile import make_profile, write_profile

__all__ = [
    "DraftSample",
    "Fit",
    "FloodSample",
    "HeadSample",
    "Observations",
    "RunSample",
    "fit_costs",
    "make_profile",
    "write_profile",
]
