"""What goes wrong, and when. Faults may overlap: what holds at a moment follows from all that are active then.

Times count from the submission of the prompt. Every fault ends by itself.
"""

import difflib
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from pipesim.scenario.network import LinkPlan
from pipesim.scenario.section import Section


class _Fault(Section):
    start_ms: float = Field(ge=0)
    """When it begins."""


class _LinkFault(_Fault):
    duration_ms: float = Field(gt=0)
    """How long it lasts."""
    link: int | str = "all"
    """Which links: the number of a hop, the name of any link such as "stage 0 to stage 1", "head to drafter" or
    "head to stage 0 (control)", or all, data, control, draft."""


class LatencyFault(_LinkFault):
    """Messages take longer; several faults add up."""

    kind: Literal["latency"]
    extra_ms: float = Field(gt=0)
    """Propagation time beside the link's own."""


class BandwidthFault(_LinkFault):
    """Links are slower; of several caps the lowest counts."""

    kind: Literal["bandwidth"]
    cap_gbps: float = Field(gt=0)
    """10^9 bits per second at most."""


class JitterFault(_LinkFault):
    """Messages take longer by chance; several faults add up."""

    kind: Literal["jitter"]
    extra_ms: float = Field(gt=0)
    """Mean of the random delay beside the link's own jitter."""


class LossFault(_LinkFault):
    """Packets are lost; several faults lose them independently of each other, and of the link's own loss."""

    kind: Literal["loss"]
    probability: float = Field(gt=0, lt=1)
    """Of each packet to be lost."""


class PartitionFault(_LinkFault):
    """Nothing arrives. What is under way is sent again when it ends, without delay and in order."""

    kind: Literal["partition"]


class SlowStageFault(_Fault):
    """A stage computes slower; the factors of several faults are multiplied."""

    kind: Literal["slow-stage"]
    duration_ms: float = Field(gt=0)
    """How long it lasts."""
    stage: int = Field(ge=0)
    """Which stage."""
    factor: float = Field(gt=1)
    """How many times as long everything takes."""


class CrashFault(_Fault):
    """A stage dies with all it holds, and comes back empty: the head then prefills the whole text again."""

    kind: Literal["crash"]
    stage: int = Field(ge=0)
    """Which stage."""
    detect_ms: float = Field(ge=0)
    """Until the head notices. Until then it goes on, and other stages do."""
    restart_ms: float = Field(ge=0)
    """From then until all stages are connected again."""


LinkFault = LatencyFault | BandwidthFault | JitterFault | LossFault | PartitionFault
Fault = Annotated[LinkFault | SlowStageFault | CrashFault, Field(discriminator="kind")]
"""One fault, chosen by its ``kind``."""


def fault_problems(faults: Sequence[Fault], stages: int, links: Sequence[LinkPlan]) -> Iterator[str]:
    """Faults that could never take effect, because there is no such stage or link."""
    known = ["all", "data", "control", "draft", *(plan.name for plan in links)]
    for i, fault in enumerate(faults):
        if isinstance(fault, SlowStageFault | CrashFault):
            if fault.stage >= stages:
                yield f"faults.{i}.stage: there is no stage {fault.stage}, the last one is {stages - 1}"
        elif isinstance(fault.link, int):
            if not 0 <= fault.link <= stages:
                last = f"the last one (home to the head) is {stages}"
                yield f"faults.{i}.link: there is no hop {fault.link}, {last}"
        elif fault.link not in known:
            close = difflib.get_close_matches(fault.link, known, n=1)
            fix = f"did you mean {close[0]!r}?" if close else "use all, data, control, draft, or a hop's number"
            yield f"faults.{i}.link: there is no link {fault.link!r}; {fix}"
