"""The frame of a policy: what it may decide, its settings, and the registry by which scenarios name it."""

import dataclasses
import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar, get_type_hints

from pipesim.errors import BadInputError
from pipesim.scheduling.generation import Generation, SpeculationLimits
from pipesim.scheduling.speculation import Node
from pipesim.scheduling.tree import DraftTree

ENTRY_POINT_GROUP = "pipesim.policies"
_BUILT_IN = ("autoregressive", "speculative", "pipeinfer")


class Policy(ABC):
    """A frozen dataclass of settings with one decision.

    A policy keeps no state: all that the head knows stands in the ``Generation``, whose moves are all that a policy
    can do. ``decide`` is called after every event of an active generation, ``draft_returned`` when a draft arrives
    whose context is still alive. Both must leave something in flight or a draft on its way (I7).
    """

    name: ClassVar[str]

    @property
    def limits(self) -> SpeculationLimits:
        """How much speculation may be in flight: nothing, unless a policy says otherwise."""
        return SpeculationLimits()

    @abstractmethod
    def decide(self, generation: Generation) -> None:
        """Makes the moves that the present state calls for."""

    def draft_returned(self, generation: Generation, tip: Node, tree: DraftTree) -> None:
        """Uses a draft that continues ``tip``, a node of the live trie. ``decide`` follows."""
        raise NotImplementedError(f"policy {self.name} asked for no draft")


_registry: dict[str, type[Policy]] = {}
P = TypeVar("P", bound=type[Policy])


def register(name: str) -> Callable[[P], P]:
    """Class decorator: makes a policy known under ``name``."""

    def remember(policy: P) -> P:
        policy.name = name
        _registry[name] = policy
        return policy

    return remember


def policy_names() -> list[str]:
    """All known policies: built in, registered, and offered by installed packages as entry points."""
    return sorted({*_BUILT_IN, *_registry, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def policy_class(name: str) -> type[Policy]:
    """Finds a policy by name. Raises BadInputError for an unknown one."""
    if name not in _registry:
        if name in _BUILT_IN:
            importlib.import_module(f"pipesim.scheduling.policies.{name}")
        else:
            for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
                register(name)(point.load())
    if name not in _registry:
        raise BadInputError(f"policy.name: there is no policy {name!r}{_nearest(name, policy_names())}")
    return _registry[name]


def make_policy(name: str, settings: Mapping[str, Any] | None = None) -> Policy:
    """Builds a policy from its name and settings.

    Raises:
        BadInputError: the name or a setting is unknown, or a value is of the wrong type or range.
    """
    policy = policy_class(name)
    types = get_type_hints(policy)
    known = [field.name for field in dataclasses.fields(policy)]  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        if key not in known:
            raise BadInputError(f"policy.{key}: {name} has no such setting{_nearest(key, known)}")
        checked[key] = _coerce(f"policy.{key}", types[key], value)
    return policy(**checked)


def policy_settings(policy: Policy) -> dict[str, Any]:
    """All settings of a policy with their values, defaults included."""
    return dataclasses.asdict(policy)  # type: ignore[call-overload, no-any-return]


def require(field: str, value: float, low: float, high: float | None = None) -> None:
    """Checks ``low <= value <= high``. Raises BadInputError naming ``policy.<field>``."""
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise BadInputError(f"policy.{field}: {value} is out of range, use a value {bounds}")


def _coerce(field: str, expected: type, value: Any) -> Any:
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise BadInputError(f"policy.{field.split('.')[-1]}: {value!r} is not a {expected.__name__}")
    return value


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
