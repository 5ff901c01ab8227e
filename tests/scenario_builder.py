"""A small scenario that every test can bend with dotted overrides."""

import copy
from typing import Any

from pipesim.scenario import Scenario
from pipesim.scenario_file import apply_overrides, build_scenario

PLAIN: dict[str, Any] = {
    "model": {"name": "toy", "layers": 12, "hidden": 64},
    "cluster": {
        "stages": [{"repeat": 3, "cost": {"kind": "linear", "constant_ms": 10, "per_token_ms": 1}}],
        "drafter": {"level_ms": 2},
        "links": {"latency_ms": 0.5, "bandwidth_gbps": 1},
    },
    "workload": {"prompt_tokens": 8, "max_new_tokens": 40},
    "policy": {"name": "pipeinfer"},
    "acceptance": {"kind": "iid", "rate": 0.7},
    "seed": 3,
}


def build(*overrides: str) -> Scenario:
    """The plain scenario with ``overrides`` such as ``"policy.name=speculative"``."""
    raw = copy.deepcopy(PLAIN)
    apply_overrides(raw, overrides)
    return build_scenario(raw)
