"""Reads scenarios from YAML, applies overrides by dotted path, and explains what is wrong with them."""

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipesim.errors import BadInputError
from pipesim.scenario import Scenario


def load_scenario(path: Path | str, overrides: Sequence[str] = ()) -> Scenario:
    """Reads a scenario file, with ``overrides`` such as ``"cluster.stages.0.layers=4"`` on top.

    Values are YAML. A new ``policy.name`` starts from that policy's defaults: the settings in the file belong to the
    policy in the file.

    Raises:
        BadInputError: one line per problem, with file, field, value and what to do.
    """
    path = Path(path)
    raw = _read(path)
    apply_overrides(raw, overrides)
    acceptance = raw.get("acceptance")
    if isinstance(acceptance, dict) and isinstance(acceptance.get("file"), str):
        acceptance["file"] = str(path.parent / acceptance["file"])
    return build_scenario(raw, str(path))


def build_scenario(raw: dict[str, Any], source: str = "scenario") -> Scenario:
    """Validates a scenario given as plain values; ``source`` names it in messages.

    Raises:
        BadInputError: one line per problem.
    """
    try:
        return Scenario.model_validate(raw)
    except ValidationError as invalid:
        errors = invalid.errors()
        broken = {error["loc"][:depth] for error in errors for depth in range(len(error["loc"]))}
        # a list whose entries are wrong counts as too short, too: that says nothing new
        told = [error for error in errors if not (error["type"] == "too_short" and error["loc"] in broken)]
        lines = (line for error in told for line in _explain(error))
        raise BadInputError("\n".join(f"{source}: {line}" for line in lines)) from None


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets each ``dotted.path=value`` in ``raw``, in order. Raises BadInputError for a path that leads nowhere."""
    split = [_split(override) for override in overrides]
    policy = raw.get("policy")
    for keys, value in split:
        if keys == ["policy", "name"] and isinstance(policy, dict) and policy.get("name") != value:
            raw["policy"] = {"name": value}
    for override, (keys, value) in zip(overrides, split, strict=True):
        _set(raw, keys, value, override)


def _split(override: str) -> tuple[list[str], Any]:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise BadInputError(f"--set {override}: write it as dotted.path=value, e.g. policy.name=pipeinfer")
    try:
        return name.split("."), yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError:
        raise BadInputError(f"--set {override}: {text!r} is not a YAML value") from None


def _set(raw: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    here: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        at: Any = key
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                raise BadInputError(
                    f"--set {override}: {'.'.join(keys[:depth])} has {len(here)} entries, {key!r} is not an index of it"
                )
            at = int(key)
        elif isinstance(here, dict):
            at = int(key) if key not in here and key.isdecimal() else key
            if not last and here.get(at) is None:
                here[at] = {}
        else:
            raise BadInputError(f"--set {override}: {'.'.join(keys[:depth])} is {here!r} and has no parts to set")
        if last:
            here[at] = value
        else:
            here = here[at]


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML takes the last of two equal keys silently; this loader refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain values", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands here for the second time", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInputError(f"{path}: the scenario cannot be read ({problem}): check the path") from None
    except yaml.YAMLError as problem:
        raise BadInputError(f"{path}: not valid YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(raw, dict):
        sections = ", ".join(Scenario.model_fields)
        raise BadInputError(f"{path}: a mapping with the sections {sections} was expected")
    return raw


def _explain(error: ErrorDetails) -> list[str]:
    """One validation error as lines of: field, value, and what to do."""
    loc, kind = error["loc"], error["type"]
    if not loc:
        return str(error["ctx"]["error"]).splitlines() if kind == "value_error" else [error["msg"]]
    known, where = _locate(loc)
    field = ".".join(where)
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(where[-1], known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"remove it; known: {', '.join(known)}"
        return [f"{field} = {error['input']!r}: there is no such key, {fix}"]
    if kind == "missing":
        return [f"{field}: missing, add it"]
    message = error["msg"][0].lower() + error["msg"][1:]
    return [f"{field} = {error['input']!r}: {message}"]


def _locate(loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """The keys known beside the last item of ``loc``, and ``loc`` without the kinds that pydantic adds for unions."""
    here: list[Any] = [Scenario]
    where: list[str] = []
    known: list[str] = []
    for item in loc:
        models = [one for one in here if isinstance(one, type) and issubclass(one, BaseModel)]
        tagged = [one for one in models if "kind" in one.model_fields and item in _kinds(one)]
        if tagged:
            here = tagged
            continue
        if item == "[key]":
            continue
        where.append(str(item))
        if isinstance(item, str):
            known = sorted({name for one in models for name in one.model_fields})
            fields = [one.model_fields[item] for one in models if item in one.model_fields]
            here = [member for field in fields for member in _members(field.annotation)]
    return known, where


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    return typing.get_args(model.model_fields["kind"].annotation)


def _members(annotation: Any) -> list[Any]:
    """The types that a value can have: members of unions, elements of tuples."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union, tuple):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]
