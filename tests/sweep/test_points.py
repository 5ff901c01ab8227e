import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from scenario_builder import build

import pipesim
from pipesim.errors import BadInputError
from pipesim.scheduling.policies.pipeinfer import PipeInfer
from pipesim.sweep import Axis, cross, parse_axis, points, simulated_metrics
from pipesim.sweep.points import fingerprint


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2.5,x,true,null", (1, 2.5, "x", True, None)),
        ("a.b=[1, 2]", (1, 2)),
        ("a.b=[[1, 2], [3]]", ([1, 2], [3])),
        ("a.b=[1, 2],[3]", ([1, 2], [3])),
        ("a.b={name: x, n: 4},{name: y}", ({"name": "x", "n": 4}, {"name": "y"})),
        ("a.b=[{name: x, n: 4}, {name: y}]", ({"name": "x", "n": 4}, {"name": "y"})),
        ("a.b=7", (7,)),
        ("a.b=1e-3", (0.001,)),
        ("a.b=0:1:lin5", (0.0, 0.25, 0.5, 0.75, 1.0)),
        ("a.b=2:128:log7", (2, 4, 8, 16, 32, 64, 128)),
        ("a.b=0.01:1:log3", (0.01, 0.1, 1.0)),
        ("a.b=1:4:lin4", (1, 2, 3, 4)),
    ],
)
def test_an_axis_is_a_list_of_yaml_values_or_a_range(text: str, values: tuple[Any, ...]) -> None:
    axis = parse_axis(text)
    assert axis == Axis("a.b", values, log=":log" in text)
    assert [type(one) for one in axis.values] == [type(one) for one in values]


@pytest.mark.parametrize(
    "text",
    ["a", "=1", "a..b=1", "a=", "a=[", "a=[]", "a=0:1:log4", "a=1:2:lin1", "a=x:y:lin3", "a=1:inf:lin3", "a=1,2,1"],
)
def test_what_is_no_axis_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(BadInputError) as caught:
        parse_axis(text)
    assert f"--vary {text}" in str(caught.value)


def test_the_cross_product_has_every_combination_the_last_key_fastest() -> None:
    assert cross([Axis("a", (1, 2)), Axis("b", ("x", "y"))]) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
    assert cross([]) == [{}]


@pytest.mark.parametrize("keys", [["a", "a"], ["a.b", "a"], ["a", "a.b.c"]])
def test_a_key_is_not_varied_twice(keys: list[str]) -> None:
    with pytest.raises(BadInputError):
        cross([Axis(key, (1, 2)) for key in keys])


def test_a_fingerprint_is_that_of_the_resolved_scenario() -> None:
    def of(*sets: str) -> str:
        return fingerprint(build(*sets), simulated_metrics)

    assert of() == of("cluster.prefill_chunk=64", "policy.micro_batch=4"), "defaults, written or not"
    assert of() == of("policies.speculative={max_nodes: 9}"), "settings of a policy that is not chosen"
    assert of("policies.pipeinfer={micro_batch: 3}") == of("policy.micro_batch=3"), "settings from either place"
    moved = ["seed=4", "policy.micro_batch=3", "cluster.links.latency_ms=9", "model.name=other"]
    assert len({of(), *map(of, moved)}) == len(moved) + 1
    assert fingerprint(build(), cross) != of()


def test_a_fingerprint_knows_the_content_of_files_and_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, copy = tmp_path / "t.json", tmp_path / "copy.json"

    def of(path: Path) -> str:
        return fingerprint(build(f"acceptance={{kind: trace, file: {path}}}"), simulated_metrics)

    absent = of(trace)
    trace.write_text("one")
    copy.write_text("one")
    first = of(trace)
    assert first == of(copy) != absent
    trace.write_text("two")
    assert of(trace) != first
    monkeypatch.setattr(pipesim, "__version__", "99")
    points._code_digest.cache_clear()
    assert of(copy) != first
    monkeypatch.undo()
    points._code_digest.cache_clear()
    assert of(copy) == first


def test_a_fingerprint_knows_the_code_of_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for text in ("one", "other"):
        (tmp_path / "a_measure.py").write_text(f"def speed(scenario):\n    return {{'{text}': 1}}\n")
        sys.modules.pop("a_measure", None)
        found.add(fingerprint(build(), importlib.import_module("a_measure").speed))
    assert len(found) == 2


def test_a_fingerprint_knows_the_code_of_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(build(), simulated_metrics)
    digest = points._file_digest
    monkeypatch.setattr(points, "_file_digest", lambda one: digest(one) + ("edited" if one is PipeInfer else ""))
    assert fingerprint(build(), simulated_metrics) != before
