"""Many simulations of one scenario with keys varied: in parallel, resumable, one row of a table for each.

>>> from pipesim.sweep import cross, parse_axis, run_points
>>> points = cross([parse_axis("policy.name=autoregressive,pipeinfer"), parse_axis("acceptance.rate=0.3:0.9:lin4")])
>>> frame = run_points(read_scenario("scenarios/ablation.yaml"), points, repeats=10)  # 2 * 4 * 10 rows
"""

from pipesim.sweep.points import Axis, cross, parse_axis
from pipesim.sweep.rows import flatten, run_points, simulated_metrics

__all__ = ["Axis", "cross", "flatten", "parse_axis", "run_points", "simulated_metrics"]
