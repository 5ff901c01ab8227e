"""The scenario schema: one description of model, cluster, workload and policy for simulation and real execution.

Units stand in the names: ``_ms`` milliseconds, ``_us`` microseconds, ``_bytes``, ``_gib`` 2^30 bytes, ``_gbps``
10^9 bits per second, ``_gbytes_s`` 10^9 bytes per second, ``_tflops`` 10^12 operations per second. Unknown keys
are errors. ``pipesim.scenario_file`` reads scenarios from YAML.
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
from pipesim.scenario.calibration import Calibration
from pipesim.scenario.cluster import Cluster, Device, Drafter, Head, Stage
from pipesim.scenario.costs import AllReduce, Cost, LinearCost, RooflineCost, TableCost
from pipesim.scenario.faults import CrashFault, Fault, LinkFault, SlowStageFault
from pipesim.scenario.model import Model, ModelShapeSection
from pipesim.scenario.network import Hop, Link, LinkPlan, Links, OwnLink, Profile, ProfilePoint
from pipesim.scenario.plans import DraftPlan, StagePlan, StageSummary
from pipesim.scenario.scenario import Scenario, json_schema
from pipesim.scenario.section import Section
from pipesim.scenario.workload import ACTIVATION_BYTES, SCALE_BYTES, Execution, PolicySection, Workload

__all__ = [
    "ACTIVATION_BYTES",
    "SCALE_BYTES",
    "Acceptance",
    "AllReduce",
    "Calibration",
    "Cluster",
    "Cost",
    "CrashFault",
    "Device",
    "DraftPlan",
    "Drafter",
    "DrawnAcceptance",
    "Execution",
    "Fault",
    "Head",
    "Hop",
    "IidAcceptance",
    "LinearCost",
    "Link",
    "LinkFault",
    "LinkPlan",
    "Links",
    "MarkovAcceptance",
    "Model",
    "ModelShapeSection",
    "OwnLink",
    "PerDepthAcceptance",
    "PolicySection",
    "PositionalAcceptance",
    "Profile",
    "ProfilePoint",
    "RooflineCost",
    "Scenario",
    "Section",
    "SlowStageFault",
    "Stage",
    "StagePlan",
    "StageSummary",
    "TableCost",
    "TraceAcceptance",
    "Workload",
    "json_schema",
]
