"""The base of all sections of a scenario."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no infinities, no quoted numbers.

    Lists in YAML become tuples here: such fields, and paths, are the only ones that are not strict.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
