"""The event log: every event a scheduler heard and every command it gave, one JSON object per line.

The first line is a header with all that builds an equal scheduler. Replaying the events through a fresh one must
give the logged commands exactly (invariant I9), whether a simulation or a real head wrote the log.

Every dataclass becomes an object with its class name under ``type``. Integers that other JSON readers would round
(beyond 2^53: sequence sets) are written as hexadecimal strings.
"""

import dataclasses
import enum
import functools
import json
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from pipesim.errors import BadInputError
from pipesim.scheduling.commands import Command
from pipesim.scheduling.events import Event
from pipesim.scheduling.policy import make_policy, policy_settings
from pipesim.scheduling.scheduler import Scheduler

FORMAT = "pipesim-events"
VERSION = 1
_EXACT = 2**53


def encode(value: Any) -> Any:
    """Turns events, commands and what they hold into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: encode(getattr(value, name)) for name in _field_types(type(value))}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if type(value) is int and abs(value) > _EXACT:
        return hex(value)
    return value


def decode(expected: Any, value: Any) -> Any:
    """Builds a value of type ``expected`` (a dataclass, a union of them, a tuple or a scalar) from plain JSON values.

    Raises:
        ValueError: the value does not have that type, or a field is missing or unknown.
    """
    origin = typing.get_origin(expected)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"a list was expected, not {value!r}")
        return tuple(decode(typing.get_args(expected)[0], item) for item in value)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(typing.get_args(expected), value)
    if dataclasses.is_dataclass(expected):
        return _decode_object(typing.cast(type, expected), value)
    if isinstance(expected, type) and issubclass(expected, enum.Enum):
        return expected(value)
    if expected is int and isinstance(value, str) and value.removeprefix("-").startswith("0x"):
        return int(value, 16)
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected or (expected is float and not math.isfinite(value)):
        raise ValueError(f"{getattr(expected, '__name__', expected)} was expected, not {value!r}")
    return value


def _decode_union(members: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in members:
        return None
    if isinstance(value, dict):
        for member in members:
            if dataclasses.is_dataclass(member) and typing.cast(type, member).__name__ == value.get("type"):
                return _decode_object(typing.cast(type, member), value)
        names = ", ".join(getattr(member, "__name__", str(member)) for member in members)
        raise ValueError(f"type {value.get('type')!r} is none of {names}")
    plain = [member for member in members if member is not type(None) and not dataclasses.is_dataclass(member)]
    if len(plain) != 1:
        raise ValueError(f"an object with a type was expected, not {value!r}")
    return decode(plain[0], value)


def _decode_object(expected: type, value: Any) -> Any:
    name = expected.__name__
    if not isinstance(value, dict) or value.get("type") != name:
        raise ValueError(f"an object of type {name} was expected, not {value!r}")
    fields = _field_types(expected)
    if value.keys() - {"type"} != fields.keys():
        odd = sorted((value.keys() - {"type"}) ^ fields.keys())
        raise ValueError(f"{name} has missing or unknown fields: {', '.join(odd)}")
    return expected(**{key: decode(kind, value[key]) for key, kind in fields.items()})


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


class EventLogWriter:
    """Writes a log as it happens, so that a crash leaves all that led to it. ``stream`` stays the caller's to close."""

    def __init__(self, stream: TextIO, scheduler: Scheduler, seed: int) -> None:
        self._stream = stream
        self._scheduler = scheduler
        self._seed = seed
        self._has_header = False

    def write(self, now: float, event: Event, commands: Sequence[Command]) -> None:
        """Adds one event, heard at ``now`` on the driver's own clock, and the commands it led to."""
        if not self._has_header:
            self._put(self._header())
            self._has_header = True
        self._put({"now": now, "event": encode(event), "commands": [encode(command) for command in commands]})

    def _header(self) -> dict[str, Any]:
        """Known only once the generation started: by default the cells depend on its length."""
        scheduler = self._scheduler
        return {
            "format": FORMAT,
            "version": VERSION,
            "policy": {"name": scheduler.policy.name, **policy_settings(scheduler.policy)},
            "kv_cells": scheduler.kv_cells,
            "prefill_chunk": scheduler.prefill_chunk,
            "prefill_window": scheduler.prefill_window,
            "seed": self._seed,
        }

    def _put(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        self._stream.flush()


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """The first event of a log to which a fresh scheduler answers differently. ``line`` counts from 1.

    ``replayed`` are its commands, or what it raised: an event that led to commands cannot be refused.
    """

    line: int
    now: float
    event: Event
    logged: tuple[Command, ...]
    replayed: tuple[Command, ...] | Exception

    def __str__(self) -> str:
        after = f"line {self.line}, at {self.now:.6f} s: the commands differ after {self.event}\n"
        if isinstance(self.replayed, Exception):
            logged = "".join(f"  logged:   {command}\n" for command in self.logged)
            return f"{after}{logged}  replayed: refused, {type(self.replayed).__name__}: {self.replayed}"
        pairs = max(len(self.logged), len(self.replayed))
        at = next(i for i in range(pairs) if self.logged[i : i + 1] != self.replayed[i : i + 1])
        logged, replayed = (
            str(commands[at]) if at < len(commands) else "(no further command)"
            for commands in (self.logged, self.replayed)
        )
        return f"{after}  command {at + 1} logged:   {logged}\n  command {at + 1} replayed: {replayed}"


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """What became of a log: the events that agree, the first that does not, and whether the generation ended."""

    events: int
    difference: Difference | None
    released: bool


def replay(path: Path) -> Difference | None:
    """The first difference between a log's commands and those of a fresh scheduler; see ``replay_log``."""
    return replay_log(path).difference


def replay_log(path: Path) -> Replay:
    """Feeds a log's events to a fresh scheduler, up to the first to which it answers differently.

    Raises:
        BadInputError: the file cannot be read, holds no event, or a line is malformed; the message names the line.
    """
    lines = _lines(path)
    try:
        _, header = next(lines)
    except StopIteration:
        raise BadInputError(f"{path}: the file is empty, an event log was expected") from None
    scheduler = _scheduler(path, header)
    events = 0
    for number, line in lines:
        try:
            now = decode(float, line["now"])
            event: Event = decode(Event, line["event"])
            logged: tuple[Command, ...] = decode(tuple[Command, ...], line["commands"])
        except KeyError as missing:
            raise BadInputError(f"{path}, line {number}: {missing} is missing") from None
        except (ValueError, TypeError, OverflowError) as problem:
            raise BadInputError(f"{path}, line {number}: {problem}") from None
        replayed: tuple[Command, ...] | Exception
        try:
            replayed = tuple(scheduler.handle(event, now))
        except Exception as refusal:
            replayed = refusal
        if replayed != logged:
            return Replay(events, Difference(number, now, event, logged, replayed), False)
        events += 1
    if not events:
        raise BadInputError(f"{path}: there is no event in it, nothing to replay")
    return Replay(events, None, scheduler.released)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, text in enumerate(stream, start=1):
                try:
                    line = json.loads(text, parse_constant=_refuse)
                except ValueError as problem:
                    raise BadInputError(f"{path}, line {number}: not valid JSON ({problem})") from None
                except RecursionError:
                    raise BadInputError(f"{path}, line {number}: nested too deeply") from None
                if not isinstance(line, dict):
                    raise BadInputError(f"{path}, line {number}: a JSON object was expected")
                yield number, line
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInputError(f"{path}: cannot be read as an event log ({problem})") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _scheduler(path: Path, header: dict[str, Any]) -> Scheduler:
    """An equal of the scheduler whose header this is."""
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise BadInputError(
            f"{path}, line 1: format {header.get('format')!r} version {header.get('version')!r} is not "
            f"{FORMAT!r} version {VERSION}: use a log that --events of this version wrote"
        )
    try:
        settings = dict(header["policy"])
        policy = make_policy(settings.pop("name"), settings)
        cells, chunk, window = (decode(int, header[key]) for key in ("kv_cells", "prefill_chunk", "prefill_window"))
        return Scheduler(policy, cells, chunk, window)
    except KeyError as missing:
        raise BadInputError(f"{path}, line 1: the header lacks {missing}") from None
    except (ValueError, TypeError, BadInputError) as problem:
        raise BadInputError(f"{path}, line 1: {problem}") from None
