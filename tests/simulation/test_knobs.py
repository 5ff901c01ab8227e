"""No setting is ignored (I10): moving each knob that simulation reads moves a metric."""

import typing
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from pydantic import BaseModel
from scenario_builder import build

from pipesim.metrics import compute_metrics
from pipesim.scenario import Scenario
from pipesim.scenario_file import _members
from pipesim.scheduling.policy import policy_class, policy_names
from pipesim.simulation.pipeline import simulate

SHARED = ["cluster.devices=[{name: box, cores: 2}]", "cluster.stages.0.device=box", "cluster.drafter.device=box"]
COURSE = "profile={points: [{at_ms: 200, latency_ms: 30, bandwidth_gbps: 0.0005}, {at_ms: 500, latency_ms: 5}]}"
LINK: dict[str, list[str]] = {
    # setting of any link: [context..., the move]
    "preset": ["preset=wan"],
    "latency_ms": ["latency_ms=20"],
    "bandwidth_gbps": ["bandwidth_gbps=0.0001"],
    "jitter_ms": ["jitter_ms=20"],
    "loss": ["loss=0.5"],
    "retransmit_ms": ["loss=0.5", "retransmit_ms=20"],
    "mtu_bytes": ["loss=0.5", "mtu_bytes=64"],
    "profile.shape": [COURSE, "profile.shape=ramps"],
    "profile.period_ms": [COURSE.replace("at_ms: 200", "at_ms: 0"), "profile.period_ms=600"],
    "profile.points.at_ms": [COURSE, "profile.points.1.at_ms=900"],
    "profile.points.latency_ms": [COURSE, "profile.points.1.latency_ms=1"],
    "profile.points.bandwidth_gbps": [COURSE, "profile.points.0.bandwidth_gbps=0.00005"],
}
LINKS = {
    # which links: [context..., where they are described]
    "cluster.links": ["cluster.links"],
    "cluster.links.hops": ["cluster.links.hops=[{hop: 1}]", "cluster.links.hops.0"],
    "cluster.links.control": ["acceptance.rate=0.3", "cluster.links.control"],
    "cluster.links.draft": ["cluster.links.draft"],
}
CRASH = "faults=[{kind: crash, stage: 1, start_ms: 300, detect_ms: 50, restart_ms: 200}]"
SLOW = "faults=[{kind: slow-stage, stage: 1, start_ms: 300, duration_ms: 200, factor: 3}]"


def fault(kind: str, **settings: Any) -> str:
    """One fault of a kind on all links, as an override."""
    given = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"faults=[{{kind: {kind}, start_ms: 300, duration_ms: 200, {given}}}]"


LATE = fault("latency", extra_ms=20)
TABLE = ["cluster.stages.0.cost={kind: table, rows_ms: {1: 10, 4: 12}}"]
MARKOV = "acceptance={kind: markov, good_rate: 0.9, bad_rate: 0.2}"
SIZES = "layers: 12, hidden: 64, heads: 8, kv_heads: 4, intermediate: 256"
ROOFLINE = "{kind: roofline, memory_bandwidth_gbytes_s: 0.05, peak_tflops: 0.001}"


def model_moves(model: str, context: list[str]) -> dict[str, list[str]]:
    """Sizes of a model that a roofline cost reads."""
    moves = ("heads=4", "kv_heads=8", "intermediate=512", "gated=false", "quantization=q8_0", "kv_bytes=4")
    return {f"{model}.{move.split('=')[0]}": [*context, f"{model}.{move}"] for move in moves}


def cost_moves(cost: str, path: str, context: list[str]) -> dict[str, list[str]]:
    """Settings of a roofline cost; ``path`` leads to it in overrides."""
    parallel = [*context, f"{path}.tensor_parallel=2", f"{path}.all_reduce={{bandwidth_gbytes_s: 0.1, latency_us: 9}}"]
    known = [*context, f"{path}={{kind: roofline, profile: dual-xeon-2023, memory_bandwidth_gbytes_s: 1.0e+6}}"]
    moves = {
        "profile": [*known, f"{path}.profile=h100-sxm"],
        "compute": [*known, f"{path}.compute=float32"],
        "memory_bandwidth_gbytes_s": [*context, f"{path}.memory_bandwidth_gbytes_s=0.1"],
        "bandwidth_efficiency": [*context, f"{path}.bandwidth_efficiency=0.5"],
        "peak_tflops": [*context, f"{path}.peak_tflops=0.00001"],
        "compute_efficiency": [*context, f"{path}.peak_tflops=0.00001", f"{path}.compute_efficiency=0.5"],
        "overhead_ms": [*context, f"{path}.overhead_ms=3"],
        "tensor_parallel": [*parallel, f"{path}.tensor_parallel=4"],
        "all_reduce.profile": [*parallel, f"{path}.all_reduce={{profile: nvlink-4}}"],
        "all_reduce.bandwidth_gbytes_s": [*parallel, f"{path}.all_reduce.bandwidth_gbytes_s=0.01"],
        "all_reduce.latency_us": [*parallel, f"{path}.all_reduce.latency_us=99"],
    }
    return {f"{cost}.{key}": sets for key, sets in moves.items()}


STAGES = [f"model={{name: toy, {SIZES}}}", f"cluster.stages.0.cost={ROOFLINE}"]
DRAFT = ["policy.name=speculative", f"cluster.drafter={{model: {{{SIZES}, vocabulary: 500}}, cost: {ROOFLINE}}}"]
MOVES: dict[str, list[str]] = {
    **model_moves("model", STAGES),
    **cost_moves("cluster.stages.cost", "cluster.stages.0.cost", STAGES),
    **model_moves("cluster.drafter.model", DRAFT),
    **cost_moves("cluster.drafter.cost", "cluster.drafter.cost", DRAFT),
    "model.profile": [*STAGES, "model={profile: smollm2-135m}", "model.profile=tinyllama-1.1b"],
    "cluster.drafter.model.profile": [
        *DRAFT,
        "cluster.drafter.model={profile: smollm2-135m}",
        "cluster.drafter.model.profile=tinyllama-1.1b",
    ],
    "cluster.drafter.model.layers": [*DRAFT, "cluster.drafter.model.layers=6"],
    "cluster.drafter.model.hidden": [*DRAFT, "cluster.drafter.model.hidden=128"],
    "cluster.drafter.model.vocabulary": [*DRAFT, "cluster.drafter.model.vocabulary=64000"],
    "cluster.stages.cost.lm_head_ms": ["cluster.stages.0.cost.lm_head_ms=5"],
    # knob (dotted, list indexes left out): [context..., the move]
    "model.layers": ["model.layers=48"],
    "model.hidden": ["model.hidden=4096"],
    "model.activation_bytes": ["model.activation_bytes=2"],
    "model.vocabulary": ["model.vocabulary=40000"],
    "cluster.stages.cost.per": ["cluster.stages.0.cost.per=layer"],
    "cluster.stages.cost.kv_us_per_kilocell": ["cluster.stages.0.cost.kv_us_per_kilocell=900"],
    "cluster.stages.cost.prefill_per_token_ms": ["cluster.stages.0.cost.prefill_per_token_ms=9"],
    "cluster.stages.cost.prefill_rows_ms": ["cluster.stages.0.cost.prefill_rows_ms={1: 9}"],
    "cluster.stages.cost.constant_ms": ["cluster.stages.0.cost.constant_ms=11"],
    "cluster.stages.cost.per_token_ms": ["cluster.stages.0.cost.per_token_ms=2"],
    "cluster.stages.cost.kind": TABLE,
    "cluster.stages.cost.rows_ms": [*TABLE, "cluster.stages.0.cost.rows_ms.4=20"],
    "cluster.stages.layers": [
        "cluster.stages=[{layers: 4, cost: &c {kind: linear, per: layer, constant_ms: 1}}, {layers: 8, cost: *c}]",
        "cluster.stages.0.layers=2",
        "cluster.stages.1.layers=10",
    ],
    "cluster.stages.device": [*SHARED[:1], "cluster.drafter.device=box", "cluster.stages.0.device=box"],
    "cluster.stages.void_ms": ["acceptance.rate=0.3", "cluster.stages.0.void_ms=5"],
    "cluster.stages.repeat": ["cluster.stages.0.repeat=4"],
    "cluster.devices.cores": [*SHARED, "cluster.devices.0.cores=1"],
    "cluster.devices.sharing": [*SHARED, "cluster.devices.0.sharing=fair"],
    "cluster.devices.contention": [*SHARED, "cluster.devices.0.sharing=fair", "cluster.devices.0.contention=0.3"],
    "cluster.drafter.device": [*SHARED[:2], "cluster.drafter.device=box"],
    "cluster.drafter.level_ms": ["cluster.drafter.level_ms=4"],
    "cluster.drafter.request_ms": ["cluster.drafter.request_ms=1"],
    "cluster.drafter.kv_us_per_kilocell": ["cluster.drafter.kv_us_per_kilocell=90000"],
    "cluster.drafter.prefill_per_token_ms": ["cluster.drafter.prefill_per_token_ms=9"],
    "cluster.head.device": [*SHARED, "cluster.head.device=box"],
    "cluster.head.overhead_ms": ["cluster.head.overhead_ms=1"],
    "cluster.head.draft_overhead_ms": ["cluster.head.draft_overhead_ms=1"],
    "cluster.devices.nic_gbps": [
        "cluster.devices=[{name: box}]",
        "cluster.stages.0.device=null",
        "cluster.head.device=box",
        "cluster.devices.0.nic_gbps=0.0001",
    ],
    **{
        f"{links}.{setting}": [*context, *(f"{place}.{one}" for one in moves)]
        for links, (*context, place) in LINKS.items()
        for setting, moves in LINK.items()
    },
    "cluster.links.hops.hop": ["cluster.links.hops=[{hop: 1, bandwidth_gbps: 0.01}]", "cluster.links.hops.0.hop=3"],
    "cluster.kv_cells": [
        "cluster.links.latency_ms=40",
        "policy={name: pipeinfer, branches: 4, p_split: 0, micro_batch: 8}",
        "cluster.kv_cells=50",
    ],
    "cluster.prefill_chunk": ["workload.prompt_tokens=100", "cluster.prefill_chunk=10"],
    "cluster.prefill_window": ["workload.prompt_tokens=100", "cluster.prefill_chunk=10", "cluster.prefill_window=1"],
    "workload.prompt": ["workload={max_new_tokens: 40, prompt: tell me}", "workload.prompt=tell me a longer story"],
    "workload.prompt_tokens": ["workload.prompt_tokens=20"],
    "workload.max_new_tokens": ["workload.max_new_tokens=30"],
    "policy.name": ["policy.name=speculative"],
    "policies": ["policies.pipeinfer={micro_batch: 2}"],
    "acceptance.rate": ["acceptance.rate=0.5"],
    "acceptance.rates": ["acceptance={kind: per_depth, rates: [0.9, 0.8, 0.7]}", "acceptance.rates.2=0.2"],
    "acceptance.good_rate": [MARKOV, "acceptance.good_rate=0.6"],
    "acceptance.bad_rate": [MARKOV, "acceptance.bad_rate=0.6"],
    "acceptance.good_tokens": [MARKOV, "acceptance.good_tokens=2"],
    "acceptance.bad_tokens": [MARKOV, "acceptance.bad_tokens=40"],
    "acceptance.runner_up": ["policy.branches=2", "policy.p_split=0.05", "acceptance.runner_up=1"],
    "acceptance.confidence_right": ["policy.p_accept=0.6", "acceptance.confidence_right=0.5"],
    "acceptance.confidence_wrong": ["policy.p_accept=0.6", "acceptance.confidence_wrong=0.9"],
    "acceptance.confidence_spread": ["policy.p_accept=0.6", "acceptance.confidence_spread=0.5"],
    "faults.kind": [fault("latency", extra_ms=20), fault("jitter", extra_ms=20)],
    "faults.start_ms": [LATE, "faults.0.start_ms=400"],
    "faults.duration_ms": [LATE, "faults.0.duration_ms=100"],
    "faults.link": [LATE, "faults.0.link=draft"],
    "faults.extra_ms": [LATE, "faults.0.extra_ms=30"],
    "faults.cap_gbps": [fault("bandwidth", cap_gbps=0.001), "faults.0.cap_gbps=0.0005"],
    "faults.probability": [fault("loss", probability=0.3), "faults.0.probability=0.6"],
    "faults.factor": [SLOW, "faults.0.factor=4"],
    "faults.stage": [CRASH, "faults.0.stage=2"],
    "faults.detect_ms": [CRASH, "faults.0.detect_ms=70"],
    "faults.restart_ms": [CRASH, "faults.0.restart_ms=300"],
    "seed": ["seed=4"],
    "execution.dtype": ["execution.dtype=bfloat16"],
    "execution.activation_compression": ["execution.activation_compression=fp8"],
}
ELSEWHERE = {
    "model.name": "a label here; names what to load for real",
    "model.tied": "memory: tests/hardware/test_memory.py",
    "cluster.drafter.model.tied": "memory: tests/hardware/test_memory.py",
    "cluster.stages.cost.memory_gib": "a limit: tests/hardware/test_memory.py",
    "cluster.drafter.cost.memory_gib": "a limit: tests/hardware/test_memory.py",
    "cluster.drafter.cost.kind": "there is but one",
    "cluster.devices.name": "a reference: a wrong one is refused",
    **{f"{links}.profile.file": "tests/simulation/test_courses.py" for links in LINKS},
    "acceptance.kind": "tests/simulation/test_acceptance.py",
    "acceptance.file": "tests/simulation/test_acceptance.py",
    "acceptance.recording": "tests/calibration/test_profile.py",
    **{
        f"calibration.{key}": "evidence: tests/calibration/test_profile.py, tests/test_comparison.py"
        for key in ("format", "date", "machine", "how", "rounds", "intervals", "residuals")
    },
    "workload.chat": "real runs",
    "workload.ignore_eos": "real runs",
    "workload.temperature": "real runs",
    "workload.top_k": "real runs",
    "workload.top_p": "real runs",
    "workload.min_p": "real runs",
    "workload.repetition_penalty": "real runs",
    "workload.stop": "real runs",
}


def knobs(model: Any, path: str = "") -> Iterator[str]:
    """Every leaf of the schema as a dotted path."""
    for name, field in model.model_fields.items():
        inner = [m for m in _members(field.annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
        for section in inner:
            yield from knobs(section, f"{path}{name}.")
        if not inner:
            yield path + name


def figures(*sets: str) -> Any:
    trace = simulate(build(*sets))
    return compute_metrics(trace), trace.tokens


def test_every_knob_of_the_schema_is_listed() -> None:
    listed = {*MOVES, *ELSEWHERE}
    found = {knob for knob in knobs(Scenario) if not knob.startswith("execution.") or knob in MOVES}
    assert found == listed


@pytest.mark.parametrize("knob", MOVES)
def test_moving_a_knob_moves_a_metric(knob: str) -> None:
    *context, move = MOVES[knob]
    if knob == "cluster.stages.layers":  # one stage's layers cannot change alone
        context, moved = context[:1], context
        assert figures(*context) != figures(*moved, move)
    else:
        assert figures(*context) != figures(*context, move)


SETTINGS: dict[str, dict[str, list[str]]] = {
    # policy: {setting: [context..., the move]}
    "autoregressive": {},
    "pipeinfer": {
        "micro_batch": ["micro_batch=2"],
        "branches": ["p_split=0.02", "branches=3"],
        "p_accept": ["p_accept=0.7"],
        "p_split": ["branches=2", "p_split=0.02"],
        "p_recovery": ["p_recovery=0.3"],
        "p_decay": ["p_accept=0.9", "p_decay=0.2"],
        "partitions": ["partitions=2"],
        "asynchronous": ["asynchronous=false"],
        "continuous": ["continuous=false"],
        "multibuffering": ["multibuffering=false"],
        "cancellation": ["cancellation=false"],
        "always_canonical": ["always_canonical=true"],
        "calibrated": ["p_accept=0.7", "calibrated=true"],
    },
    "speculative": {
        "max_nodes": ["max_nodes=2"],
        "branches": ["split=0.02", "branches=2"],
        "cutoff": ["cutoff=0.7"],
        "split": ["branches=2", "split=0.02"],
    },
}
MOVED = [(policy, setting) for policy, settings in SETTINGS.items() for setting in settings]


def test_every_setting_of_every_policy_is_listed() -> None:
    classes = {name: policy_class(name) for name in policy_names()}
    ours = {name: one for name, one in classes.items() if one.__module__.startswith("pipesim.")}  # not other tests'
    found = {name: {field.name for field in fields(one)} for name, one in ours.items()}  # type: ignore[arg-type]
    assert found == {name: set(settings) for name, settings in SETTINGS.items()}


@pytest.mark.parametrize(("policy", "setting"), MOVED)
def test_moving_a_policy_setting_moves_a_metric(policy: str, setting: str) -> None:
    *context, move = SETTINGS[policy][setting]
    sets = [f"policy.{one}" for one in (f"name={policy}", *context)]
    assert figures(*sets) != figures(*sets, f"policy.{move}")


def test_the_knob_walk_sees_unions_and_lists() -> None:
    assert typing.cast(Any, {"cluster.stages.cost.rows_ms", "cluster.links.hops.hop"}) <= set(knobs(Scenario))
