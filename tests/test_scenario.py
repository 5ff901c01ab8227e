import dataclasses
from pathlib import Path

import pytest
from scenario_builder import build

from pipesim.errors import BadInputError
from pipesim.scenario import LinearCost, Link, json_schema
from pipesim.scenario.network import PRESETS
from pipesim.scenario_file import load_scenario

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "scenarios").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_scenario_that_we_ship_is_valid(path: Path) -> None:
    assert load_scenario(path).stages()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hiden=4", "model.hiden = 4: there is no such key, did you mean 'hidden'?"),
        ("modl=4", "modl = 4: there is no such key, did you mean 'model'?"),
        (
            "cluster.stages.0.cost.constnt_ms=4",
            "cluster.stages.0.cost.constnt_ms = 4: there is no such key, did you mean",
        ),
        ("cluster.links.latencyms=4", "did you mean 'latency_ms'?"),
        ("workload.zzz=4", "workload.zzz = 4: there is no such key, remove it; known: chat, ignore_eos"),
        ("cluster.links.bandwidth_gbps=-1", "cluster.links.bandwidth_gbps = -1: input should be greater than 0"),
        ("cluster.links.bandwidth_gbps=.inf", "cluster.links.bandwidth_gbps = inf: input should be a finite number"),
        ("cluster.drafter.level_ms=fast", "cluster.drafter.level_ms = 'fast': input should be a valid number"),
        ("cluster.stages=[]", "cluster.stages = []: tuple should have at least 1 item"),
        ("cluster.stages.0.layers=3", "layers sum up to 9, model.layers is 12"),
        ("cluster.stages.0.repeat=13", "13 stages need at least 13 layers, model.layers is 12"),
        ("cluster.stages.0.device=moon", "cluster.stages.0.device: there is no device 'moon'"),
        ("cluster.devices=[{name: a}]", "nothing runs on device 'a'"),
        ("cluster.devices=[{name: a}, {name: a}]", "two devices are named 'a'"),
        ("cluster.links.hops=[{hop: 4}]", "cluster.links.hops.0.hop: there is no hop 4, the last one"),
        ("cluster.links.hops=[{hop: 1}, {hop: 1}]", "cluster.links.hops.1.hop: hop 1 is described twice"),
        ("cluster.links.preset=2gbe", "cluster.links.preset = '2gbe': input should be 'loopback', '10gbe'"),
        ("cluster.links.loss=1", "cluster.links.loss = 1: input should be less than 1"),
        ("cluster.links.jitter_ms=-1", "cluster.links.jitter_ms = -1: input should be greater than or equal to 0"),
        ("cluster.links.profile={}", "cluster.links.profile: give either points or file"),
        ("cluster.links.draft.profile={points: []}", "cluster.links.draft.profile.points: there is no point in it"),
        (
            "cluster.links.control.profile={points: [{at_ms: 2}, {at_ms: 2}]}",
            "cluster.links.control.profile.points: at_ms = 2.0 stands behind 2.0: put the points in order of time",
        ),
        (
            "cluster.links.hops=[{hop: 1, profile: {period_ms: 5, points: [{at_ms: 5}]}}]",
            "cluster.links.hops.0.profile.points: at_ms = 5.0 is not within period_ms = 5.0",
        ),
        (
            "cluster.links.profile={period_ms: 5, points: [{at_ms: 1, latency_ms: 1}]}",
            "cluster.links.profile.points: latency_ms begins at 1.0 ms: a course that repeats needs its value at 0 ms",
        ),
        ("cluster.devices=[{name: a, nic_gbps: 0}]", "cluster.devices.0.nic_gbps = 0: input should be greater than 0"),
        (
            "faults=[{start_ms: 1}]",
            "faults.0.kind: missing, add it; known: latency, bandwidth, jitter, loss, partition",
        ),
        ("faults=[{kind: flood}]", "faults.0.kind: there is no 'flood'; known: latency"),
        ("faults=[{kind: partition, start_ms: 1}]", "faults.0.duration_ms: missing, add it"),
        ("faults=[{kind: crash, start_ms: 1, stage: 0, detect_ms: 1}]", "faults.0.restart_ms: missing, add it"),
        (
            "faults=[{kind: partition, start_ms: 1, duration_ms: .inf}]",
            "faults.0.duration_ms = inf: input should be a finite number",
        ),
        (
            "faults=[{kind: partition, start_ms: 1, duration_ms: 1, link: 4}]",
            "faults.0.link: there is no hop 4, the last one (home to the head) is 3",
        ),
        (
            "faults=[{kind: partition, start_ms: 1, duration_ms: 1, link: stage0 to stage 1}]",
            "faults.0.link: there is no link 'stage0 to stage 1'; did you mean 'stage 0 to stage 1'?",
        ),
        (
            "faults=[{kind: partition, start_ms: 1, duration_ms: 1, link: xyz}]",
            "faults.0.link: there is no link 'xyz'; use all, data, control, draft, or a hop's number",
        ),
        (
            "faults=[{kind: slow-stage, start_ms: 1, duration_ms: 1, factor: 2, stage: 3}]",
            "faults.0.stage: there is no stage 3, the last one is 2",
        ),
        (
            "faults=[{kind: slow-stage, start_ms: 1, duration_ms: 1, factor: 1, stage: 0}]",
            "faults.0.factor = 1: input should be greater than 1",
        ),
        ("workload={max_new_tokens: 4}", "give a prompt"),
        ("workload={max_new_tokens: 4, prompt: ''}", "workload.prompt: an empty prompt"),
        ("workload.max_new_tokens=0", "workload.max_new_tokens = 0"),
        ("policy.name=pipinfer", "policy.name: there is no policy 'pipinfer'; did you mean 'pipeinfer'?"),
        ("policy.micro_bach=3", "policy.micro_bach: pipeinfer has no such setting; did you mean 'micro_batch'?"),
        ("policy.micro_batch=0", "policy.micro_batch: 0 is out of range"),
        ("acceptance.kind=psychic", "acceptance.kind: there is no 'psychic'; known: iid, per_depth, markov, trace"),
        ("acceptance={rate: 0.5}", "acceptance.kind: missing, add it; known: iid, per_depth, markov, trace"),
        (
            "cluster.stages.0.cost={constant_ms: 1}",
            "cluster.stages.0.cost.kind: missing, add it; known: linear, table",
        ),
        ("model.layers=true", "model.layers = True: input should be a valid integer"),
        ("model.layers='12'", "model.layers = '12': input should be a valid integer"),
        ("acceptance.rate='0.5'", "acceptance.rate = '0.5': input should be a valid number"),
        ("acceptance.rate=true", "acceptance.rate = True: input should be a valid number"),
        ("seed=1.0", "seed = 1.0: input should be a valid integer"),
        ("workload.chat=1", "workload.chat = 1: input should be a valid boolean"),
        ("cluster.stages.0.cost={kind: table, rows_ms: {1: 1, '1': 2}}", "rows_ms.1"),
        ("acceptance.rate=1.5", "acceptance.rate = 1.5: input should be less than or equal to 1"),
        ("execution.spares=['a:1']", "execution.spares: they take the place of lost hosts"),
        ("execution.recovery.attempts=-1", "execution.recovery.attempts = -1"),
        ("execution.recovery.timeout_s=0", "execution.recovery.timeout_s = 0"),
        ("execution.hosts=[null]", "execution.hosts: 1 hosts for 3 stages"),
        ("execution.dtype=float8", "execution.dtype = 'float8'"),
        ("execution.device=gpu", "execution.device: 'gpu' is no device, use cpu, or cuda:0, cuda:1"),
        ("execution.device=[cpu, cuda, cpu]", "execution.device: 'cuda' is no device, use cpu, or cuda:0"),
        ("execution.device=[cpu, null]", "execution.device: 2 devices for 3 stages: one per stage, or one for all"),
        ("execution.drafter_device=tpu", "execution.drafter_device: 'tpu' is no device"),
        ("model=null", "model = None"),
    ],
)
def test_bad_input_is_refused_with_field_value_and_fix(override: str, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        build(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value), "one problem, one line"


def test_all_problems_are_told_at_once_one_line_each() -> None:
    with pytest.raises(BadInputError) as caught:
        build("model.hidden=0", "cluster.stages.0.repeat=none", "acceptance.rate=7")
    lines = str(caught.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == [
        "scenario: model.hidden",
        "scenario: cluster.stages.0.repeat",
        "scenario: acceptance.rate",
    ]


def test_a_missing_key_is_named() -> None:
    with pytest.raises(BadInputError, match=r"cluster\.stages\.0\.cost: missing, add it"):
        build("cluster.stages=[{}]")


def test_layers_without_a_number_are_spread_evenly() -> None:
    scenario = build(
        "model.layers=14",
        "cluster.stages=[{layers: 3, cost: &c {kind: linear, constant_ms: 1}}, {repeat: 3, cost: *c}]",
    )
    plans = scenario.stages()
    assert [plan.layers for plan in plans] == [3, 4, 4, 3]
    assert [plan.first_layer for plan in plans] == [0, 3, 7, 11]
    assert [plan.name for plan in plans] == ["stage 0", "stage 1", "stage 2", "stage 3"]


def test_a_hop_differs_only_in_what_it_says() -> None:
    hops = build("cluster.links.hops=[{hop: 2, latency_ms: 9}]").hops()
    plain = Link(latency_ms=0.5, bandwidth_gbps=1)
    assert hops == (plain, plain, Link(latency_ms=9, bandwidth_gbps=1), plain)


def test_control_and_draft_links_differ_only_in_what_they_say() -> None:
    plans = build("cluster.links.control.latency_ms=9", "cluster.links.draft={bandwidth_gbps: 7}").links()
    assert {plan.link for plan in plans if plan.group == "control"} == {Link(latency_ms=9, bandwidth_gbps=1)}
    assert {plan.link for plan in plans if plan.group == "draft"} == {Link(latency_ms=0.5, bandwidth_gbps=7)}


def test_a_preset_stands_behind_own_settings_and_before_those_of_all_links() -> None:
    scenario = build(
        "cluster.links={preset: wifi, latency_ms: 3, hops: [{hop: 1, jitter_ms: 9}, {hop: 2, preset: wan, loss: 0.5}]}"
    )
    wifi = dataclasses.replace(PRESETS["wifi"], latency_ms=3)
    assert scenario.hops() == (
        wifi,
        dataclasses.replace(wifi, jitter_ms=9),
        dataclasses.replace(PRESETS["wan"], loss=0.5),
        wifi,
    )


def test_every_preset_has_a_name_in_the_schema() -> None:
    preset = json_schema()["$defs"]["OwnLink"]["properties"]["preset"]
    assert set(preset["anyOf"][0]["enum"]) == set(PRESETS)


def test_overrides_reach_lists_dicts_and_sections_that_are_not_there_yet() -> None:
    scenario = build(
        "cluster.stages.0.cost={kind: table, rows_ms: {1: 10, 4: 12}}",
        "cluster.stages.0.cost.rows_ms.4=11",
        "execution.threads_per_stage=2",
        "workload.top_p=0.9",
    )
    cost = scenario.cluster.stages[0].cost
    assert cost.kind == "table"
    assert cost.rows_ms == {1: 10, 4: 11}
    assert scenario.execution.threads_per_stage == 2
    assert scenario.workload.top_p == 0.9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.name", "write it as dotted.path=value"),
        ("=3", "write it as"),
        ("a..b=3", "write it as"),
        ("cluster.stages.7.layers=4", "cluster.stages has 1 entries, '7' is not an index"),
        ("cluster.stages.x.layers=4", "'x' is not an index"),
        ("seed.deep.down=4", "seed is 3 and has no parts"),
        ("seed=[", "is not a YAML value"),
        ("seed=2024-99-99", "is not a YAML value ('2024-99-99' is not a value of type"),
        ("seed=0x_", "is not a YAML value"),
        ("seed=!!bool maybe", "is not a YAML value"),
        ("seed=!!timestamp noon", "is not a YAML value"),
        ("model.name=&a [*a]", "an alias stands inside of what it names"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override: str, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        build(override)
    assert f"--set {override}" in str(caught.value)
    assert message in str(caught.value)


def test_another_policy_starts_from_its_own_defaults() -> None:
    sets = ["policy={name: pipeinfer, micro_batch: 2}", "policy.max_nodes=7", "policy.name=speculative"]
    scenario = build(*sets[:1])
    assert scenario.policy.build() == build("policy.micro_batch=2").policy.build()
    with pytest.raises(BadInputError, match="max_nodes"):
        build(*sets[:2])


def test_settings_for_the_new_policy_may_stand_before_or_after_its_name(tmp_path: Path) -> None:
    path = ROOT / "scenarios" / "demo.yaml"
    for sets in (["policy.name=speculative", "policy.max_nodes=7"], ["policy.max_nodes=7", "policy.name=speculative"]):
        policy = load_scenario(path, sets).policy
        assert (policy.name, policy.model_extra) == ("speculative", {"max_nodes": 7})
    kept = load_scenario(path, ["policy.name=pipeinfer"]).policy
    assert kept == load_scenario(path).policy, "the same policy keeps its settings"


def test_overrides_of_the_policy_count_in_their_order() -> None:
    replaced = build("policy={name: pipeinfer, micro_batch: 2}", "policy.name=speculative").policy
    assert (replaced.name, replaced.model_extra) == ("speculative", {})
    replaced = build("policy.micro_batch=3", "policy={name: pipeinfer}", "policy.name=speculative").policy
    assert replaced.model_extra == {}
    again = build("policy.name=speculative", "policy={name: pipeinfer, micro_batch: 2}").policy
    assert (again.name, again.model_extra) == ("pipeinfer", {"micro_batch": 2})


def test_an_override_changes_nothing_but_what_it_names() -> None:
    """Also where an alias in the YAML text gives two stages one cost."""
    stages = "cluster.stages=[{layers: 6, cost: &c {kind: linear, constant_ms: 1}}, {layers: 6, cost: *c}]"
    first, second = build(stages, "cluster.stages.0.cost.constant_ms=9").cluster.stages
    assert first.cost == LinearCost(kind="linear", constant_ms=9)
    assert second.cost == LinearCost(kind="linear", constant_ms=1)


def test_numbers_with_an_exponent_are_numbers() -> None:
    scenario = build("cluster.links.bandwidth_gbps=1e-3", "cluster.links.latency_ms=2E+1", "acceptance.rate=1")
    assert (scenario.cluster.links.bandwidth_gbps, scenario.cluster.links.latency_ms) == (0.001, 20.0)


def test_schema_and_loader_agree_that_a_kind_is_needed() -> None:
    definitions = json_schema()["$defs"]
    for name in (
        "LinearCost",
        "TableCost",
        "IidAcceptance",
        "PerDepthAcceptance",
        "MarkovAcceptance",
        "TraceAcceptance",
    ):
        assert "kind" in definitions[name]["required"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("just text", "a mapping with the sections model, cluster"),
        ("seed: 1\nseed: 2\n", "key 'seed' stands here for the second time"),
        ("[1, 2]: 3", "plain values"),
        ("{}", "model: missing, add it"),
        ("seed: 2024-99-99", "not valid YAML: '2024-99-99' is not a value of type"),
        ("model: " + "[" * 5000, "not valid YAML: nested too deeply"),
        ("model: &a {name: *a}", "not valid YAML: an alias stands inside of what it names"),
    ],
)
def test_a_file_that_is_no_scenario_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(BadInputError) as caught:
        load_scenario(path)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be read"):
        load_scenario(tmp_path / "none.yaml")


def test_a_trace_file_is_looked_for_beside_the_scenario(tmp_path: Path) -> None:
    text = (ROOT / "scenarios" / "demo.yaml").read_text()
    path = tmp_path / "s.yaml"
    path.write_text(text)
    scenario = load_scenario(path, ["acceptance={kind: trace, file: t.json}"])
    assert scenario.acceptance is not None
    assert scenario.acceptance.kind == "trace"
    assert scenario.acceptance.file == tmp_path / "t.json"
    hops = "cluster.links.hops=[{hop: 1, profile: {file: h.csv}}]"
    links = load_scenario(path, ["cluster.links.profile.file=l.csv", hops]).cluster.links
    assert [one.profile.file for one in (links, *links.hops) if one.profile] == [tmp_path / "l.csv", tmp_path / "h.csv"]


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    sections = {"model", "cluster", "workload", "policy", "policies", "acceptance", "execution", "faults", "seed"}
    sections |= {"calibration"}
    assert set(schema["properties"]) == sections
    policies = schema["$defs"].pop("PolicySection")["oneOf"]
    settings = {policy["title"]: set(policy["properties"]) for policy in policies}
    assert settings["speculative"] == {"name", "max_nodes", "branches", "cutoff", "split"}
    assert {"autoregressive", "pipeinfer"} <= set(settings)
    for name, section in schema["$defs"].items():
        for key, field in section["properties"].items():
            assert field.get("description") or field.get("const"), f"{name}.{key} has no description"
