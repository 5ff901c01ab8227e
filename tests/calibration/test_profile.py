"""The profile is a scenario, survives the way through its file, and takes the place of another one's costs."""

import io
from pathlib import Path

import pytest
import yaml
from observing import ACCEPTANCE, observe
from scenario_builder import PLAIN, build

from pipesim.calibration import fit_costs, make_profile, write_profile
from pipesim.errors import BadInputError
from pipesim.metrics import compute_metrics
from pipesim.scenario import Calibration
from pipesim.scenario_file import load_scenario
from pipesim.simulation.pipeline import simulate

TRUE = build(
    "cluster.devices=[{name: box, cores: 2, sharing: fair, contention: 0.2}]",
    "cluster.stages=[{repeat: 2, device: box, cost: {kind: linear, constant_ms: 9, per_token_ms: 1}}]",
    "cluster.kv_cells=77",
)
TWO = {**PLAIN, "cluster": {**PLAIN["cluster"], "stages": [{**PLAIN["cluster"]["stages"][0], "repeat": 2}]}}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.yaml"
    fit = fit_costs(observe(TRUE, noise=0.02), 2)
    raw = make_profile(TRUE, fit, (True, True), 2, 4, ACCEPTANCE)
    stream = io.StringIO()
    write_profile(raw, stream)
    path.write_text(stream.getvalue(), encoding="utf-8")
    return path


def test_a_profile_is_a_scenario_with_its_evidence(profile: Path) -> None:
    scenario = load_scenario(profile)
    assert isinstance(scenario.calibration, Calibration)
    assert scenario.calibration.rounds == 4
    assert "cluster.stages.0.cost.rows_ms.1" in scenario.calibration.intervals
    assert scenario.cluster.kv_cells == 77
    assert simulate(scenario).tokens == ACCEPTANCE.tokens, "the recording is in it"
    assert profile.read_text().count("\n") < 150


def test_a_scenario_that_names_a_profile_has_its_costs_and_set_changes_them(profile: Path, tmp_path: Path) -> None:
    named = tmp_path / "folder" / "scenario.yaml"
    named.parent.mkdir()
    named.write_text(yaml.safe_dump({**TWO, "calibration": "../profile.yaml"}))
    scenario, own = load_scenario(named), load_scenario(profile)
    assert scenario.cluster.stages == own.cluster.stages
    assert scenario.cluster.links == own.cluster.links
    assert (scenario.workload, scenario.acceptance) == (build().workload, build().acceptance)
    slower = load_scenario(named, ["cluster.stages.0.cost.rows_ms.1=90"])
    metrics = [compute_metrics(simulate(one)) for one in (scenario, slower)]
    assert metrics[0].e2e_s
    assert metrics[1].e2e_s
    assert metrics[1].e2e_s > metrics[0].e2e_s


def test_what_is_set_by_hand_has_no_measured_limits(profile: Path) -> None:
    """A prediction's interval must not draw a value from limits of the one that it replaced."""
    before = load_scenario(profile).calibration
    assert isinstance(before, Calibration)
    for key, value in (("cluster.stages.0.cost.rows_ms.1", "90"), ("cluster.links.hops.0", "{hop: 0, latency_ms: 9}")):
        evidence = load_scenario(profile, [f"{key}={value}"]).calibration
        assert isinstance(evidence, Calibration)
        assert evidence.intervals.keys() == {one for one in before.intervals if not f"{one}.".startswith(f"{key}.")}


def test_a_scenario_needs_no_cluster_beside_a_profile(profile: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.yaml"
    short.write_text("calibration: profile.yaml\npolicy: {name: speculative, max_nodes: 3}\n")
    assert simulate(load_scenario(short)).tokens == ACCEPTANCE.tokens


def test_links_in_general_do_not_hide_behind_measured_ones(profile: Path) -> None:
    with pytest.raises(BadInputError, match=r"links.latency_ms: .* set cluster.links.hops.0.latency_ms"):
        load_scenario(profile, ["cluster.links.latency_ms=20"])
    assert {link.latency_ms for link in load_scenario(profile, ["cluster.links={latency_ms: 20}"]).hops()} == {20}


def test_a_profile_of_another_number_of_stages_is_refused(profile: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(PLAIN))
    with pytest.raises(BadInputError, match=r"measured 2 stages, cluster\.stages describes 3"):
        load_scenario(other, [f"calibration={profile}"])


def test_set_names_a_profile_too(profile: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(TWO))
    assert load_scenario(plain, [f"calibration={profile}"]).cluster.stages == load_scenario(profile).cluster.stages


@pytest.mark.parametrize(
    ("named", "message"),
    [("missing.yaml", "missing.yaml: the scenario cannot be read"), ("plain.yaml", "plain.yaml is no profile: name")],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, named: str, message: str) -> None:
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(PLAIN))
    with pytest.raises(BadInputError, match=message):
        load_scenario(tmp_path / "plain.yaml", [f"calibration={named}"])


def test_a_path_that_nobody_read_is_refused() -> None:
    with pytest.raises(BadInputError, match="only scenario files and --set can name a profile"):
        build("calibration=profile.yaml")
