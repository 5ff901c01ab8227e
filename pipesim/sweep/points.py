"""What a sweep varies, the scenario of each point, and the fingerprint by which a finished point is known again."""

import functools
import hashlib
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipesim
from pipesim.errors import BadInputError
from pipesim.scenario import Scenario
from pipesim.scenario_file import parse_value
from pipesim.scheduling.policy import policy_settings

Point = Mapping[str, Any]
"""Dotted path of a scenario key -> the value that it has here; whole sections may be values."""

_RANGE = re.compile(r"(?P<low>[^:,]+):(?P<high>[^:,]+):(?P<scale>log|lin)(?P<count>\d+)")

_NO_PART = {"__pycache__", "cli", "sweep"}
"""What a row does not depend on."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A key and the values that it takes in turn. ``log``: they are equally spaced on a logarithmic scale."""

    key: str
    values: tuple[Any, ...]
    log: bool = False


def parse_axis(text: str) -> Axis:
    """Reads ``key=a,b,c`` (YAML values), ``key=[a, b, c]`` (the same), ``key=low:high:log8`` or ``key=low:high:lin5``.

    Both ends of a range are among its values; they are whole numbers if all of them come out so.

    Raises:
        BadInputError: it cannot be read.
    """
    key, equals, values = text.partition("=")
    if not equals or not all(key.split(".")) or not values.strip():
        raise BadInputError(f"--vary {text}: write it as dotted.path=a,b,c or dotted.path=low:high:log8")
    if span := _RANGE.fullmatch(values.strip()):
        return Axis(key, _spaced(text, **span.groupdict()), log=span["scale"] == "log")
    try:
        listed = parse_value(f"[{values}]")
    except ValueError as problem:
        raise BadInputError(f"--vary {text}: {values!r} is not a list of YAML values ({problem})") from None
    if len(listed) == 1 and isinstance(listed[0], list):
        (listed,) = listed
    if not listed:
        raise BadInputError(f"--vary {text}: an empty list, give at least one value")
    for text_of_value, count in Counter(map(repr, listed)).items():
        if count > 1:
            raise BadInputError(f"--vary {text}: {text_of_value} stands there {count} times")
    return Axis(key, tuple(listed))


def _spaced(text: str, low: str, high: str, scale: str, count: str) -> tuple[float, ...]:
    try:
        first, last, steps = float(low), float(high), int(count) - 1
    except ValueError:
        raise BadInputError(f"--vary {text}: {low!r} and {high!r} must be numbers") from None
    logarithmic = scale == "log"
    if steps < 1 or not all(map(math.isfinite, (first, last))) or (logarithmic and min(first, last) <= 0):
        raise BadInputError(f"--vary {text}: a range has two finite ends, above 0 for log, and at least 2 values")
    values = []
    for step in range(steps + 1):
        share = step / steps
        value = first * (last / first) ** share if logarithmic else first + (last - first) * share
        values.append(float(f"{value:.12g}"))
    whole = all(value.is_integer() for value in values)
    return tuple(int(value) for value in values) if whole else tuple(values)


def cross(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Every combination of the axes' values; the last axis varies fastest.

    Raises:
        BadInputError: a key, or a part of one, is varied twice.
    """
    keys = [axis.key for axis in axes]
    for one, other in itertools.permutations(keys, 2):
        if f"{other}.".startswith(f"{one}.") and one != "policy":
            raise BadInputError(f"--vary {other}: {one} is varied, too: pair them as a list of sections, or leave one")
    if len(set(keys)) < len(keys):
        raise BadInputError(f"--vary: a key stands twice in {', '.join(keys)}: give it all values at once")
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def fingerprint(scenario: Scenario, measure: Callable[..., Any]) -> str:
    """The hash of all that decides a row: the resolved scenario, what is measured, and this version of pipesim.

    Resolved means: defaults spelled out, the policy's too, files that it names by their content, settings of policies
    that are not chosen left out. The version is ``pipesim.__version__`` and the content of the files of the simulator,
    of the policy and of ``measure``, so that rows do not outlive a change of the code either.
    """
    resolved = scenario.model_dump(exclude={"policies", "policy"})
    policy = scenario.policy.build()
    resolved["policy"] = {"name": policy.name, **policy_settings(policy)}
    code = [_code_digest(), _file_digest(type(policy)), _file_digest(measure), measure.__qualname__]
    text = json.dumps([code, resolved], sort_keys=True, default=_content)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _content(value: Any) -> str:
    """A file's content in place of its name."""
    if not isinstance(value, Path):
        raise TypeError(f"{value!r} has no place in a fingerprint")
    return hashlib.sha256(value.read_bytes()).hexdigest() if value.is_file() else str(value)


@functools.cache
def _code_digest() -> str:
    root = Path(pipesim.__file__).parent
    digest = hashlib.sha256(pipesim.__version__.encode())
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not _NO_PART.intersection(name.parts):
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _file_digest(defined: Callable[..., Any]) -> str:
    """The file in which a function or class is written; its name, where there is no file."""
    module = sys.modules[defined.__module__]
    return _content(Path(getattr(module, "__file__", None) or module.__name__))
