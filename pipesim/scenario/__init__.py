"""The scenario schema: one description of model, cluster, workload and policy for simulation and real execution.

Units stand in the names: ``_ms`` milliseconds, ``_us`` microseconds, ``_bytes``, ``_gbps`` 10^9 bits per second.
Unknown keys are errors. ``pipesim.scenario_file`` reads scenarios from YAML.
"""

from pipesim.scenario.acceptance import (
    Acceptance,
    DrawnAcceptance,
    IidAcceptance,
    MarkovAcceptance,
    PerDepthAcceptance,
    PositionalAcceptance,
    TraceAcceptance,
)
from pipesim.scenario.cluster import Cluster, Device, Drafter, Head, Stage, StagePlan
from pipesim.scenario.costs import Cost, LinearCost, TableCost
from pipesim.scenario.model import Model
from pipesim.scenario.network import Hop, Link, Links, OwnLink
from pipesim.scenario.scenario import Scenario, json_schema
from pipesim.scenario.section import Section
from pipesim.scenario.workload import Execution, PolicySection, Workload

__all__ = [
    "Acceptance",
    "Cluster",
    "Cost",
    "Device",
    "Drafter",
    "DrawnAcceptance",
    "Execution",
    "Head",
    "Hop",
    "IidAcceptance",
    "LinearCost",
    "Link",
    "Links",
    "MarkovAcceptance",
    "Model",
    "OwnLink",
    "PerDepthAcceptance",
    "PolicySection",
    "PositionalAcceptance",
    "Scenario",
    "Section",
    "Stage",
    "StagePlan",
    "TableCost",
    "TraceAcceptance",
    "Workload",
    "json_schema",
]
