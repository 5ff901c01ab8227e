"""The frame of a policy: what it may decide, its settings, and the registry by which scenarios name it."""

import dataclasses
import difflib
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, ClassVar, TypeVar, get_type_hints

from pipesim.errors import BadInputError
from pipesim.scheduling import policies
from pipesim.scheduling.generation import Generation, SpeculationLimits
from pipesim.scheduling.speculation import Node
from pipesim.scheduling.tree import DraftTree

ENTRY_POINT_GROUP = "pipesim.policies"
_SETTING_TYPES = (bool, int, float, str)


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
    """Class decorator: makes a policy, a dataclass, known under ``name``. Settings are bool, int, float or str."""

    def remember(policy: P) -> P:
        for field, expected in _setting_types(policy).items():
            if expected not in _SETTING_TYPES:
                raise TypeError(f"policy {name}: setting {field} is a {expected}, only bool, int, float and str can be")
        policy.name = name
        _registry[name] = policy
        return policy

    return remember


def policy_names() -> list[str]:
    """All known policies: built in, registered, and offered by installed packages as entry points."""
    return sorted({*_built_in(), *_registry, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def policy_class(name: str) -> type[Policy]:
    """Finds a policy by name. Raises BadInputError for an unknown one."""
    if name not in _registry:
        if name in _built_in():
            importlib.import_module(f"{policies.__name__}.{name}")
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
    types = _setting_types(policy)
    checked: dict[str, Any] = {}
    for key, value in (settings or {}).items():
        if key not in types:
            raise BadInputError(f"policy.{key}: {name} has no such setting{_nearest(key, list(types))}")
        checked[key] = _checked(key, types[key], value)
    return policy(**checked)


def policy_settings(policy: Policy) -> dict[str, Any]:
    """All settings of a policy with their values, defaults included."""
    return dataclasses.asdict(policy)  # type: ignore[call-overload, no-any-return]


def require(field: str, value: float, low: float, high: float | None = None) -> None:
    """Checks ``low <= value <= high``. Raises BadInputError naming ``policy.<field>``."""
    if not (low <= value and (high is None or value <= high)):  # NaN is out of range, too
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise BadInputError(f"policy.{field}: {value} is out of range, use a value {bounds}")


def _built_in() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(policies.__path__)}


def _setting_types(policy: type[Policy]) -> dict[str, type]:
    hints = get_type_hints(policy)
    return {field.name: hints[field.name] for field in dataclasses.fields(policy)}  # type: ignore[arg-type]


def _checked(field: str, expected: type, value: Any) -> Any:
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise BadInputError(f"policy.{field}: {value!r} is not of type {expected.__name__}")
    return value


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known) or 'none'}"
