"""What a prediction of a real run takes from the scenario, and what from the probe."""

from scenario_builder import build

from pipesim.acceptance_trace import FORMAT, AcceptanceTrace
from pipesim.comparison import with_probed_costs
from pipesim.executors import Probe


def test_what_no_real_run_has_is_left_out_of_its_prediction() -> None:
    scenario = build(
        "cluster.devices=[{name: box, nic_gbps: 1}]",
        "cluster.head.device=box",
        "cluster.links={preset: wan}",
        "faults=[{kind: crash, stage: 1, start_ms: 300, detect_ms: 50, restart_ms: 200}]",
    )
    trace = AcceptanceTrace(format=FORMAT, prompt_tokens=(1,), tokens=(2,), stop_tokens=(), candidates=((),))
    probed = with_probed_costs(scenario, Probe(({1: 1.0},) * 3, (1.0,) * 3, 0.25, 0.0, 1.0, 0.0, trace))
    assert not probed.faults
    assert [device.nic_gbps for device in probed.cluster.devices] == [None]
    assert {(link.latency_ms, link.bandwidth_gbps, link.jitter_ms) for link in probed.hops()} == {(0.25, None, 0)}
