"""The base of all sections of a scenario."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

_Profile = TypeVar("_Profile")


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no infinities, no quoted numbers.

    Lists in YAML become tuples here: such fields, and paths, are the only ones that are not strict. What a section's
    own validators raise names the key: messages put the section before it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def find_profile(key: str, name: str, known: Mapping[str, _Profile]) -> _Profile:
    """What ``known`` has under ``name``; raises ValueError with the nearest names."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or known
        raise ValueError(f"{key} = {name!r}: there is no such profile, known are {', '.join(close)}")
    return known[name]
