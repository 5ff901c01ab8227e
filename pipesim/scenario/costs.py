"""What a run costs at a stage: the schema of cost models."""

from typing import Annotated, Literal

from pydantic import Field

from pipesim.scenario.section import Section


class _Cost(Section):
    per: Literal["stage", "layer"] = "stage"
    """Whether the times are those of the whole stage, or of each of its layers."""
    kv_us_per_kilocell: float = Field(default=0.0, ge=0)
    """Extra time of each row for every 1000 KV cells of context that it attends to, itself included."""
    prefill_per_token_ms: float | None = Field(default=None, ge=0)
    """Time per prompt row in a prefill run, which takes at least a one-row run's time; null: as any other row."""


class LinearCost(_Cost):
    """Time of a run at a stage: constant_ms + rows * per_token_ms."""

    kind: Literal["linear"]
    constant_ms: float = Field(gt=0)
    """Time that every run takes, whatever its rows: reading the weights."""
    per_token_ms: float = Field(default=0.0, ge=0)
    """Time that every row adds."""


class TableCost(_Cost):
    """Time of a run at a stage, measured at some numbers of rows; linear between and beyond them."""

    kind: Literal["table"]
    rows_ms: dict[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Rows of a run -> its time. Constant under the smallest number given; never falling beyond the largest."""


Cost = Annotated[LinearCost | TableCost, Field(discriminator="kind")]
