"""What the user asks for, by which policy, and how real pipelines are brought up."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from pipesim.scenario.section import Section
from pipesim.scheduling.policy import Policy, make_policy

ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 4, "quantized": 2}
"""Bytes of an activation element between real stages, by ``execution.dtype``. Hidden states are as wide on the way as
they are between any two layers, so that it makes no difference where a stage ends. With float16 weights that is
float32: hidden states of real models leave float16's range (103,795 in Gemma-3-270M)."""
SCALE_BYTES = 4
"""Beside one byte per element, what a row of compressed activations takes."""


class Workload(Section):
    """What the user asks for."""

    prompt: str | None = None
    """The prompt's text."""
    prompt_tokens: int | None = Field(default=None, ge=1)
    """Simulation: tokens of the prompt; null: as in the recorded trace, or one for every 4 characters of the text."""
    max_new_tokens: int = Field(ge=1)
    """Tokens to generate at most."""
    chat: bool = False
    """Real runs: put the prompt into the model's chat template."""
    ignore_eos: bool = False
    """Real runs: generate on past the model's end-of-text token."""
    temperature: float = Field(default=0.0, ge=0)
    """Real runs: 0 takes the most probable token; otherwise, from 0.001 on, tokens are sampled, reproducibly from the
    seed."""
    top_k: int | None = Field(default=None, ge=1)
    """Real runs: sample among this many most probable tokens."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Real runs: sample among the most probable tokens that reach this probability together."""
    min_p: float | None = Field(default=None, gt=0, le=1)
    """Real runs: sample among tokens at least this many times as probable as the most probable one."""
    repetition_penalty: float | None = Field(default=None, gt=0)
    """Real runs: makes tokens that the text has had already, prompt included, less likely from 1 on."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), strict=False)
    """Real runs: the text ends before the first of these strings."""


class PolicySection(BaseModel):
    """The policy's name and, beside it, its own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """Registered name: autoregressive, speculative, pipeinfer, or one from an installed package."""

    def build(self) -> Policy:
        """The policy itself. Raises BadInputError for an unknown name or setting."""
        return make_policy(self.name, self.model_extra)


def _device(name: Any) -> Any:
    if not (isinstance(name, str) and re.fullmatch(r"cpu|cuda:\d+", name)):
        raise ValueError(f"{name!r} is no device, use cpu, or cuda:0, cuda:1, ..")
    return name


def _devices(names: Any) -> Any:
    if isinstance(names, list | tuple):
        return tuple(name if name is None else _device(name) for name in names)
    return names if names is None else _device(names)


class Recovery(Section):
    """Real runs: what is done about a lost stage."""

    attempts: int = Field(default=3, ge=0)
    """How often in a row, without a token in between, a broken pipeline is restored; 0: a lost stage or drafter ends
    the generation with an error that names it."""
    timeout_s: float = Field(default=60.0, gt=0)
    """How long one of these attempts may take: start a process, load layers, connect."""


class Execution(Section):
    """Real runs: how the pipeline is brought up."""

    drafter: str = "ngram"
    """ngram (prompt look-up), layer-skip (the target without some layers), planted (known text, wrong as often as
    acceptance.rate says), or a draft model: name or path."""
    skip_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, strict=False)
    """layer-skip: layers to leave out; null: 5, 12, 17 and 25 of 30, the same depths of other models, the ends kept."""
    hosts: tuple[str | None, ...] | None = Field(default=None, strict=False)
    """host:port of a running stage server for each stage, null to start one here; null: start all here."""
    dtype: Literal["float32", "bfloat16", "float16", "quantized"] = "float32"
    """Number format of weight matrices; quantized: a GGUF file's blocks (Q4_0 to Q8_0, Q4_K to Q6_K) as they are.
    Activations are float32, with bfloat16 and quantized weights bfloat16."""
    device: Annotated[str | tuple[str | None, ...] | None, BeforeValidator(_devices)] = None
    """Where stages compute: cpu, cuda:0, cuda:1, ..; one for all or one for each stage. null: what the stage server was
    started with, cpu for those started here."""
    drafter_device: Annotated[str, AfterValidator(_device)] = "cpu"
    """Where a draft model computes."""
    kernels: Literal["auto", "native", "torch", "compile"] = "auto"
    """What computes: native kernels (CPUs only), compiled there, torch's operations, or these compiled by
    torch.compile; auto: native where possible, else torch."""
    activation_compression: Literal["none", "fp8", "int8"] = "none"
    """For slow links, lossy: activations travel in one byte per element and 4 per row, each row scaled by itself. The
    text depends on it, and on where stages end, but still not on policy, micro-batches or losses. Simulations count
    its bytes."""
    threads_per_stage: int = Field(default=1, ge=1)
    """Compute threads of each stage process."""
    emulate: bool = False
    """Keep every stage, the drafter, the head and every message to the times of cluster and faults, at the least: real
    layers, real gRPC and real text at another cluster's pace."""
    stand_in: str | None = None
    """emulate: the model that computes in the place of model.name, its layers spread evenly; times and messages stay
    those of the model section. null: model.name itself."""
    startup_timeout_s: float | None = Field(default=None, gt=0)
    """How long stages may take to load and connect; null: 120 s, 1,200 s with kernels: compile."""
    recovery: Recovery = Recovery()
    """What is done about a lost stage."""
    spares: tuple[str, ...] = Field(default=(), strict=False)
    """host:port of running stage servers without a stage: each takes the place of one of hosts that is lost and does
    not come back within 10 s."""

    @property
    def lossy(self) -> str | None:
        """What makes the text another one than the same stages' without it, for people; None if nothing does."""
        if self.activation_compression == "none":
            return None
        return f"activations travel as {self.activation_compression} (execution.activation_compression)"

    @property
    def startup_limit_s(self) -> float:
        """``startup_timeout_s``, or its default for these kernels."""
        return self.startup_timeout_s or (1200.0 if self.kernels == "compile" else 120.0)

    def devices(self, stages: int) -> tuple[str | None, ...]:
        """The device of each of so many stages."""
        return self.device if isinstance(self.device, tuple) else (self.device,) * stages
