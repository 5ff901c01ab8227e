"""The profile: a scenario whose costs were measured, with the evidence. It can be simulated, executed and compared as
it is, and other scenarios can name it under ``calibration``."""

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from pipesim.acceptance_trace import AcceptanceTrace, format_acceptance_trace
from pipesim.calibration.fitting import Fit
from pipesim.scenario import Scenario
from pipesim.scenario_file import apply_settings, build_scenario

SHARED = "this machine"
"""The device of all that runs where the head runs."""
_CARRIED = ("kv_cells", "prefill_chunk", "prefill_window")


def make_profile(
    scenario: Scenario, fit: Fit, here: Sequence[bool], cores: int | None, rounds: int, trace: AcceptanceTrace | None
) -> dict[str, Any]:
    """The profile of a pipeline as plain values, checked.

    Args:
        scenario: what was brought up: its model, layers, drafter, workload and policy are kept.
        fit: what was measured.
        here: for each stage, whether it shares the head's machine.
        cores: of that machine, as far as stages can use them at the same time; None where it has no stage.
        rounds: how often everything was measured.
        trace: the text of the scenario's prompt, and what the drafter made of it.
    """
    device = None if cores is None else SHARED
    stages = [
        {"layers": plan.layers, "device": device if local else None, "cost": {"kind": "table"}}
        for plan, local in zip(scenario.stages(), here, strict=True)
    ]
    given = scenario.model_dump(mode="json", exclude_defaults=True)
    cluster: dict[str, Any] = {
        "devices": [] if cores is None else [{"name": SHARED, "cores": cores, "sharing": "fair"}],
        "stages": stages,
        "head": {"device": device},
        "drafter": {"device": device},
        "links": {"hops": [{"hop": hop} for hop in range(len(stages) + 1)], "control": {}, "draft": {}},
        **{key: given["cluster"][key] for key in _CARRIED if key in given["cluster"]},
    }
    raw: dict[str, Any] = {"model": given["model"], "cluster": cluster, "workload": given["workload"]}
    raw |= {"policy": given["policy"], "policies": given.get("policies", {})}
    raw |= {"execution": given.get("execution", {}), "seed": scenario.seed}
    apply_settings(raw, [(key, _rounded(value)) for key, value in fit.values.items()])
    if crashes := [fault for fault in given.get("faults", ()) if fault["kind"] == "crash"]:
        raw["faults"] = crashes  # of all faults, the ones that real runs meet
    if trace is not None:
        raw["acceptance"] = {"kind": "trace", "recording": format_acceptance_trace(trace)}
    raw["calibration"] = {
        "format": "pipesim-profile-1",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "how": (
            "runs of each size one at a time on the idle pipeline, all kinds in turns, after a round that does not "
            "count; floods of runs on stages that share a machine; head events in generations"
        ),
        "rounds": rounds,
        "intervals": {key: [_rounded(low), _rounded(high)] for key, (low, high) in fit.intervals.items()},
        "residuals": {name: _rounded(value) for name, value in fit.residuals.items()},
    }
    build_scenario(raw, "the profile")
    return raw


def write_profile(profile: dict[str, Any], stream: TextIO) -> None:
    """Writes YAML. Raises OSError."""
    stream.write("# Measured by pipesim calibrate. A scenario like any other: pipesim simulate, execute, compare.\n")
    yaml.dump(profile, stream, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def describe_machine() -> str:
    """Processor, cores and system of this machine, in a line."""
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{processor}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, small mappings and lists of numbers on a line."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def _list(dumper: yaml.SafeDumper, entries: list[Any]) -> yaml.Node:
    flow = all(isinstance(one, int | float) for one in entries)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", entries, flow_style=flow)


def _dict(dumper: yaml.SafeDumper, entries: dict[Any, Any]) -> yaml.Node:
    flow = all(isinstance(one, int | float) for one in entries.values()) and len(json.dumps(entries)) < 100
    return dumper.represent_mapping("tag:yaml.org,2002:map", entries, flow_style=flow)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)
_Dumper.add_representer(dict, _dict)
