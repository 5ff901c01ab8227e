"""Reads scenarios from YAML, applies overrides by dotted path, and explains what is wrong with them."""

import difflib
import re
import types
import typing
from collections.abc import Iterable, Sequence
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
    raw = read_scenario(path, overrides)
    locate_files(raw, Path(path).parent)
    return build_scenario(raw, str(path))


def read_scenario(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a scenario file as plain values that are not checked yet, with ``overrides`` on top.

    A profile that it names under ``calibration`` is read, too: the overrides change what was measured.

    Raises:
        BadInputError: a file is not YAML, a profile is none, or an override leads nowhere.
    """
    raw = _read(Path(path))
    apply_overrides(raw, [one for one in overrides if one.startswith(_CALIBRATION)])
    if isinstance(raw.get("calibration"), str):
        raw = _calibrated(raw, Path(path).parent / raw["calibration"])
    others = [one for one in overrides if not one.startswith(_CALIBRATION)]
    apply_overrides(raw, others)
    _forget_intervals(raw, [one.partition("=")[0] for one in others])
    return raw


_CALIBRATION = "calibration="
_ABOUT_THE_RUN = ("workload", "policy", "policies", "acceptance", "faults", "seed")


def _calibrated(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """A scenario with the measured costs of the profile at ``path``; without a workload it has the profile's, too."""
    profile = _read(path)
    if not isinstance(profile.get("calibration"), dict) or not isinstance(profile.get("cluster"), dict):
        raise BadInputError(f"calibration: {path} is no profile: name a file that `pipesim calibrate` wrote")
    if "workload" in raw:
        profile = {key: value for key, value in profile.items() if key not in ("workload", "acceptance")}
    own = raw.get("cluster")
    cluster = {**own, **profile["cluster"]} if isinstance(own, dict) else profile["cluster"]
    wanted, measured = (_stages(one) for one in (own, profile["cluster"]))
    if wanted and wanted != measured:
        raise BadInputError(
            f"calibration: {path} measured {measured} stages, cluster.stages describes {wanted}: leave cluster.stages "
            f"out, or calibrate {wanted} stages"
        )
    return {**profile, **{key: raw[key] for key in _ABOUT_THE_RUN if key in raw}, "cluster": cluster}


def _stages(cluster: Any) -> int:
    """How many stages a cluster describes; 0 where that is left open, or wrong in ways that the schema tells."""
    match cluster:
        case {"stages": list(stages)}:
            repeats = [one.get("repeat", 1) for one in stages if isinstance(one, dict)]
            return sum(repeats) if all(isinstance(one, int) for one in repeats) else 0
    return 0


def _forget_intervals(raw: dict[str, Any], keys: Sequence[str]) -> None:
    """What is set by hand has no confidence limits any more, nor has anything in it."""
    evidence = raw.get("calibration")
    intervals = evidence.get("intervals") if isinstance(evidence, dict) else None
    if isinstance(intervals, dict):
        for measured in list(intervals):
            if any(f"{measured}.".startswith(f"{key}.") for key in keys):
                del intervals[measured]


def locate_files(raw: dict[str, Any], folder: Path) -> None:
    """Files that a scenario names are looked for in ``folder``, that of the scenario file."""
    for section in ("acceptance", "cluster"):
        _look_in(folder, raw.get(section))


def _look_in(folder: Path, here: Any) -> None:
    if isinstance(here, dict) and isinstance(here.get("file"), str):
        here["file"] = str(folder / here["file"])
    for inside in here.values() if isinstance(here, dict) else here if isinstance(here, list) else ():
        _look_in(folder, inside)


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
    """Sets each ``dotted.path=value`` in ``raw``, in order, as :func:`apply_settings` does. Values are YAML."""
    settings = [_split(override) for override in overrides]
    try:
        apply_settings(raw, settings)
    except BadInputError as problem:
        raise BadInputError(f"--set {problem}") from None


def apply_settings(raw: dict[str, Any], settings: Iterable[tuple[str, Any]]) -> None:
    """Sets each dotted path in ``raw`` to its value, in order. Raises BadInputError for a path that leads nowhere.

    Another ``policy.name`` keeps those of the policy's settings that are set here.
    """
    given: dict[str, Any] = {}
    for path, value in settings:
        keys = path.split(".")
        policy = raw.get("policy")
        if keys == ["policy"]:
            given = {}
        elif keys == ["policy", "name"] and isinstance(policy, dict) and policy.get("name") != value:
            raw["policy"] = given
        elif keys[0] == "policy":
            given[keys[1]] = value
        try:
            _set(raw, keys, value)
        except LookupError as problem:
            raise BadInputError(f"{path}={value}: {problem.args[0]}") from None


def _split(override: str) -> tuple[str, Any]:
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise BadInputError(f"--set {override}: write it as dotted.path=value, e.g. policy.name=pipeinfer")
    try:
        return name, parse_value(text)
    except ValueError as problem:
        raise BadInputError(f"--set {override}: {text!r} is not a YAML value ({problem})") from None


def _set(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    """Raises LookupError for keys that lead nowhere."""
    here: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        at: Any = key
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                raise LookupError(f"{'.'.join(keys[:depth])} has {len(here)} entries, {key!r} is not an index of it")
            at = int(key)
        elif isinstance(here, dict):
            at = int(key) if key not in here and key.isdecimal() else key
            if not last and here.get(at) is None:
                here[at] = {}
        else:
            raise LookupError(f"{'.'.join(keys[:depth])} is {here!r} and has no parts to set")
        if last:
            here[at] = value
        else:
            here = here[at]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter: it refuses equal keys, and calls all that it cannot read a YAMLError.

    It also knows numbers such as 1e-3, which PyYAML takes for text.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):  # what PyYAML makes of 2024-99-99, 0x_ and !!bool maybe
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value!r} is not a value of type {node.tag}", node.start_mark
            ) from None

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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_value(text: str) -> Any:
    """Plain values from YAML, none of them shared: to set one does not change another. Raises ValueError."""
    try:
        return _unshared(yaml.load(text, _Loader), ())
    except yaml.YAMLError as problem:
        raise ValueError(" ".join(str(problem).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unshared(value: Any, around: tuple[int, ...]) -> Any:
    """A copy in which an anchor's value stands once for each alias; ``around`` are the ids of what it stands in."""
    if id(value) in around:
        raise ValueError("an alias stands inside of what it names")
    inside = (*around, id(value))
    if isinstance(value, dict):
        return {key: _unshared(entry, inside) for key, entry in value.items()}
    if isinstance(value, list):
        return [_unshared(entry, inside) for entry in value]
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInputError(f"{path}: the scenario cannot be read ({problem}): check the path") from None
    try:
        raw = parse_value(text)
    except ValueError as problem:
        raise BadInputError(f"{path}: not valid YAML: {problem}") from None
    if not isinstance(raw, dict):
        sections = ", ".join(Scenario.model_fields)
        raise BadInputError(f"{path}: a mapping with the sections {sections} was expected")
    return raw


def _explain(error: ErrorDetails) -> list[str]:
    """One validation error as lines of: field, value, and what to do."""
    loc, kind = error["loc"], error["type"]
    if not loc:
        return str(error["ctx"]["error"]).splitlines() if kind == "value_error" else [error["msg"]]
    here, known, where = _locate(loc)
    field = ".".join(where)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        kinds = ", ".join(tag for one in here for tag in _kinds(one))
        told = error["input"].get("kind") if isinstance(error["input"], dict) else None
        return [f"{field}.kind: " + (f"there is no {told!r}" if told else "missing, add it") + f"; known: {kinds}"]
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(where[-1], known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"remove it; known: {', '.join(known)}"
        return [f"{field} = {error['input']!r}: there is no such key, {fix}"]
    if kind == "missing":
        return [f"{field}: missing, add it"]
    if kind == "value_error":  # a section's own validator
        return [f"{field}: {line}" for line in str(error["ctx"]["error"]).splitlines()]
    message = error["msg"][0].lower() + error["msg"][1:]
    return [f"{field} = {error['input']!r}: {message}"]


def _locate(loc: tuple[int | str, ...]) -> tuple[list[Any], list[str], list[str]]:
    """What may stand at ``loc``, the keys known beside it, and ``loc`` without the kinds that pydantic puts into it."""
    here: list[Any] = [Scenario]
    where: list[str] = []
    known: list[str] = []
    for item in loc:
        models = [one for one in here if isinstance(one, type) and issubclass(one, BaseModel)]
        tagged = [one for one in models if item in _kinds(one)]
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
    return here, known, where


def _kinds(model: Any) -> tuple[Any, ...]:
    """The kinds that choose ``model`` from its union; none for what is no such model."""
    field = getattr(model, "model_fields", {}).get("kind")
    return typing.get_args(field.annotation) if field else ()


def _members(annotation: Any) -> list[Any]:
    """The types that a value can have: members of unions, elements of tuples."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _members(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union, tuple):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]
