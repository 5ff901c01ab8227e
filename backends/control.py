"""The messages of the control and draft streams, as msgpack with a type tag."""

from typing import Annotated, TypeVar

import msgspec

from backends.frames import TOKEN_BYTES, Compression, FrameError, Hop
from backends.sampling import Sampling
from pipesim.errors import BadInputError
from pipesim.scheduling.commands import RequestDraft
from pipesim.scheduling.tree import Candidate, Detour, DraftTree

_Token = Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]


class ConfigureStage(msgspec.Struct, frozen=True, tag="configure-stage", forbid_unknown_fields=True):
    """Head -> node, first: become stage ``stage`` with layers ``[first_layer, last_layer)`` of ``model``.

    ``fingerprint`` is that of the head's own weights: those of a stage must be the same. ``device`` is None for the
    one that the node was started with. ``compression`` is that of activations. ``emulated``: an
    ``emulation.EmulatedStage``, to whose pace sessions that want it are kept.
    """

    token: _Token
    stage: int
    model: str
    fingerprint: str
    first_layer: int
    last_layer: int
    dtype: str
    kernels: str
    threads: int
    device: str | None = None
    emulated: bytes | None = None
    compression: Compression = "none"


class ConfigureDrafter(msgspec.Struct, frozen=True, tag="configure-drafter", forbid_unknown_fields=True):
    """Head -> node, first: become the drafter ``drafter`` (ngram, layer-skip, planted, or a draft model).

    ``model`` is the target, with ``vocabulary`` tokens; texts have up to ``max_context`` tokens. ``skip_layers`` are
    those of layer-skip (None: its own choice). ``emulated``: as for a stage, an ``EmulatedDrafter``.
    """

    token: _Token
    drafter: str
    model: str
    vocabulary: int
    max_context: int
    dtype: str
    kernels: str
    threads: int
    skip_layers: tuple[int, ...] | None
    device: str = "cpu"
    emulated: bytes | None = None


class Connect(msgspec.Struct, frozen=True, tag="connect", forbid_unknown_fields=True):
    """Head -> stage, once all are ready: open the data stream to ``successor`` (None: you are the last)."""

    successor: str | None


class Reset(msgspec.Struct, frozen=True, tag="reset", forbid_unknown_fields=True):
    """Head -> stage, after another one was lost: keep your layers, forget all sessions, links and frames.

    From now on only senders with the new ``token`` are ours. Answered by ``Ready``, and followed by ``Connect``.
    """

    token: _Token


class Cancel(msgspec.Struct, frozen=True, tag="cancel", forbid_unknown_fields=True):
    """Head -> stage: these runs are dead; in an emulated cluster from the end of ``hop`` on."""

    session: int
    epoch: int
    run_ids: tuple[int, ...]
    hop: Hop | None = None


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", forbid_unknown_fields=True):
    """Head -> node: answer, between two layers at the latest."""

    number: int


class Ready(msgspec.Struct, frozen=True, tag="ready", forbid_unknown_fields=True):
    """Node -> head: the configured part is loaded, or nothing is left of what was to be forgotten.

    ``arithmetic`` is a stage's: those with equal ones compute bit for bit alike.
    """

    arithmetic: str = ""


class Connected(msgspec.Struct, frozen=True, tag="connected", forbid_unknown_fields=True):
    """Stage -> head: the successor has accepted the data stream."""


class Beat(msgspec.Struct, frozen=True, tag="beat", forbid_unknown_fields=True):
    """Node -> head: it lives; its monotonic clock in seconds and the last run it handled (-1: none)."""

    number: int
    clock: float
    last_run: int


class Failed(msgspec.Struct, frozen=True, tag="failed", forbid_unknown_fields=True):
    """Node -> head: I cannot go on. ``bad_input``: because of what the user asked for."""

    message: str
    bad_input: bool


class LinkLost(msgspec.Struct, frozen=True, tag="link-lost", forbid_unknown_fields=True):
    """Stage -> head: the data stream to or from my neighbour broke; the cause is likely there."""

    neighbour: int
    reason: str


class Planted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a planted drafter replays: prompt and continuation, and a ``PositionalAcceptance`` as plain values."""

    known_text: tuple[int, ...]
    acceptance: dict[str, float | str]


class StartText(msgspec.Struct, frozen=True, tag="start", forbid_unknown_fields=True):
    """Head -> drafter: a new text begins with ``prompt``; ``sampling`` is the target's.

    ``origin``: its drafts are those of an emulated cluster, whose time 0 this is on the drafter's clock, in seconds.
    """

    session: int
    prompt: tuple[int, ...]
    sampling: Sampling
    planted: Planted | None
    origin: float | None = None


class ExtendText(msgspec.Struct, frozen=True, tag="extend", forbid_unknown_fields=True):
    """Head -> drafter: these tokens were committed."""

    session: int
    tokens: tuple[int, ...]


class DraftOrder(msgspec.Struct, frozen=True, tag="order", forbid_unknown_fields=True):
    """Head -> drafter: draft a tree; the first ``request.frontier`` tokens are known by now.

    ``hop``: how it comes in an emulated cluster.
    """

    session: int
    request: RequestDraft
    hop: Hop | None = None


class EndText(msgspec.Struct, frozen=True, tag="end", forbid_unknown_fields=True):
    """Head -> drafter: the text is complete, nobody waits for a draft of it."""

    session: int


class TraceText(msgspec.Struct, frozen=True, tag="trace", forbid_unknown_fields=True):
    """Head -> drafter: what would you propose all along ``tokens``? Ends the session's text, if one was started."""

    session: int
    tokens: tuple[int, ...]
    sampling: Sampling
    planted: Planted | None


class TraceReply(msgspec.Struct, frozen=True, tag="traced", forbid_unknown_fields=True):
    """Drafter -> head: entry ``i`` are the candidates for token ``i + 1``, best first; and ``Drafter.detours``."""

    session: int
    candidates: tuple[tuple[Candidate, ...], ...]
    detours: tuple[Detour, ...] | None


class DraftReply(msgspec.Struct, frozen=True, tag="draft", forbid_unknown_fields=True):
    """Drafter -> head: the tree (None: abandoned), and from when to when it was drafted, on the drafter's clock.

    ``hops``: of an emulated cluster, the request's and, unless it was abandoned, the answer's.
    """

    session: int
    request_id: int
    tree: DraftTree | None
    start: float
    end: float
    hops: tuple[Hop, ...] = ()


ToNode = ConfigureStage | ConfigureDrafter | Connect | Reset | Cancel | Heartbeat
FromNode = Ready | Connected | Beat | Failed | LinkLost
ToDrafter = StartText | ExtendText | DraftOrder | EndText | TraceText
FromDrafter = DraftReply | TraceReply

_Message = TypeVar("_Message")
_encoder = msgspec.msgpack.Encoder()
TO_NODE: msgspec.msgpack.Decoder[ToNode] = msgspec.msgpack.Decoder(ToNode)
FROM_NODE: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)
TO_DRAFTER: msgspec.msgpack.Decoder[ToDrafter] = msgspec.msgpack.Decoder(ToDrafter)
FROM_DRAFTER: msgspec.msgpack.Decoder[FromDrafter] = msgspec.msgpack.Decoder(FromDrafter)


def pack(message: ToNode | FromNode | ToDrafter | FromDrafter) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def unpack(decoder: "msgspec.msgpack.Decoder[_Message]", data: bytes) -> _Message:
    """The message in ``data``. Raises FrameError if it is none of the decoder's."""
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, BadInputError, ValueError) as error:
        raise FrameError(f"not a message of this protocol: {error}") from error
