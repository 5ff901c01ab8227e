"""Machines of a scenario, and what runs on them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipesim.scenario.costs import Cost, RooflineCost
from pipesim.scenario.model import ModelShapeSection
from pipesim.scenario.network import Links
from pipesim.scenario.section import Section


class Device(Section):
    """A machine that several parts share."""

    name: str
    """Stages, head and drafter refer to it by this name."""
    cores: int = Field(default=1, ge=1)
    """How many stages, or stages and drafter, can compute on it at the same time; see ``sharing`` for more."""
    sharing: Literal["queue", "fair"] = "queue"
    """Who finds no core free waits in FIFO order (queue), or all go on at an equally reduced pace (fair), as processes
    under an operating system do."""
    contention: float = Field(default=0.0, ge=0)
    """sharing: fair: share by which a run of one row takes longer for each other core at work on such a run, as cores
    share memory bandwidth. Of two runs, each counts by how fast it reads weights: one that takes twice as long as a
    one-row run of its stage counts half. Drafts count as runs of one row; messages, head and dead runs not at all."""
    nic_gbps: float | None = Field(default=None, gt=0)
    """10^9 bits per second, each way, that all its links to other devices share; null: without limit."""

    @model_validator(mode="after")
    def _check(self) -> "Device":
        if self.contention and self.sharing == "queue":
            raise ValueError(f"contention = {self.contention}: only with sharing: fair")
        return self


class Stage(Section):
    """One stage of the pipeline, or ``repeat`` equal ones in a row."""

    cost: Cost
    """What a run costs here."""
    layers: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Layers of this stage. null: the model's other layers are spread evenly over all stages without a number. auto:
    they are placed such that the slowest stage's one-row run is as fast as can be, LM head and a head on the same
    device included, as far as memory has room."""
    device: str | None = None
    """Device it runs on; null: a machine of its own."""
    void_ms: float = Field(default=0.0, ge=0)
    """Time that a dead run takes here all the same."""
    repeat: int = Field(default=1, ge=1)
    """This many equal stages in a row."""


class Head(Section):
    """The part that runs the scheduler."""

    device: str | None = None
    """Device it runs on; null: a machine of its own."""
    overhead_ms: float = Field(default=0.0, ge=0)
    """Time to handle one event: a run or a draft that came home."""
    draft_overhead_ms: float | None = Field(default=None, ge=0)
    """Time to handle a draft that came home; null: as any other event."""


class Drafter(Section):
    """The part that drafts."""

    device: str | None = None
    """Device it runs on; null: a machine of its own."""
    level_ms: float | None = Field(default=None, ge=0)
    """Time to draft one level of a token tree, all its branches at once; null: from model and cost."""
    request_ms: float = Field(default=0.0, ge=0)
    """Time that every request takes on top of its levels."""
    kv_us_per_kilocell: float = Field(default=0.0, ge=0)
    """Extra time of each level for every 1000 tokens of text before it; with model and cost it follows from them."""
    prefill_per_token_ms: float = Field(default=0.0, ge=0)
    """Time per prompt token before the first draft; with model and cost it follows from them."""
    model: ModelShapeSection | None = None
    """The draft model, in the place of level_ms."""
    cost: RooflineCost | None = None
    """What the draft model runs on, in the place of level_ms."""

    @model_validator(mode="after")
    def _check(self) -> "Drafter":
        if self.level_ms is None and (self.model is None or self.cost is None):
            missing = "model" if self.cost else "cost" if self.model else "level_ms"
            raise ValueError(f"{missing}: missing, give level_ms or both model and cost")
        if self.level_ms is not None and (self.model or self.cost):
            raise ValueError(f"level_ms = {self.level_ms}: follows from model and cost: remove it or them")
        for key in ("prefill_per_token_ms", "kv_us_per_kilocell"):
            if (value := getattr(self, key)) and self.level_ms is None:
                raise ValueError(f"{key} = {value}: follows from model and cost: remove it")
        return self


class Cluster(Section):
    """Machines, what runs on them, and the links between."""

    stages: tuple[Stage, ...] = Field(min_length=1, strict=False)
    """The pipeline in order."""
    drafter: Drafter
    """What drafts, and how fast."""
    devices: tuple[Device, ...] = Field(default=(), strict=False)
    """Machines that are shared, or that have several cores."""
    head: Head = Head()
    """What runs the scheduler."""
    links: Links = Links()
    """The network."""
    kv_cells: int | None = Field(default=None, ge=1)
    """KV cells of every stage; null: enough for the text and all that the policy can have in flight."""
    prefill_chunk: int = Field(default=64, ge=1)
    """Prompt tokens per prefill run."""
    prefill_window: int = Field(default=8, ge=1)
    """Prefill runs in flight at once."""
