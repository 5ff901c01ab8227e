"""The wire format: what stages send each other and the head over the ordered data streams.

A frame is a fixed little-endian header, msgpack metadata, and raw activation bytes. Nothing in it is ever executed:
every length and every value is checked before use, and whatever is wrong raises :class:`FrameError`.

One ordered stream carries a whole session: ``OpenFrame``, then runs (dead ones as void frames: metadata only), then
``ReleaseFrame``. Each frame travels through all stages and comes home from the last one, runs as ``ResultFrame``.
"""

import enum
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, TypeVar

import msgspec

from backends.sampling import Sampling
from pipesim.errors import BadInputError, PipesimError
from pipesim.scheduling.runs import END, KvOperation, Run, RunKind, SequenceCopy, SequenceRemove

MAGIC = b"PSIM"
VERSION = 3
TOKEN_BYTES = 16
MAX_FRAME_BYTES = 64 * 2**20
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Data types that activations may have, with their size."""
MAX_ROWS = 2**16
"""So many tokens one run may carry."""
MAX_KV_CELLS = 2**24
"""A session's cells number fewer: their memory is taken before the first run."""

_HEADER = struct.Struct(f"<4sBB2x{TOKEN_BYTES}sQIQII")


Compression = Literal["none", "fp8", "int8"]
"""Of activations, as ``execution.activation_compression``."""
SCALE_BYTES = 4
_FP8_NAN = 0x7F  # with either sign; float8_e4m3fn has no other


class FrameError(PipesimError):
    """A frame that this version does not understand, or that contradicts itself."""


class StrangerError(PipesimError):
    """A frame with the token of nobody whom the reader knows."""


class FrameKind(enum.IntEnum):
    """The header field that says what the metadata is."""

    OPEN = 1
    RUN = 2
    VOID = 3
    RESULT = 4
    RELEASE = 5


class Session(NamedTuple):
    """Whose frame it is: the head's secret token, the generation's number, and the pipeline's epoch."""

    token: bytes
    number: int
    epoch: int


class StageStamp(NamedTuple):
    """What a stage writes on a run that passes: its clock in seconds, and the size of the frame that brought the run.

    ``void``: the run was dead on arrival or called off between layers.
    """

    stage: int
    start: float
    end: float
    void: bool
    received_bytes: int


class Hop(NamedTuple):
    """A message of an emulated cluster on a link, and what the stage behind it adds: nanoseconds since the prompt.

    What the model says: ``start`` and ``sent`` of ``size`` bytes, ``arrival``; ``begin`` and ``end`` of the run there.
    What was really so: ``received``, ``computed``, ``left``; and ``late_calls``, by how much cancellations since the
    frame before came after their modelled arrival.
    """

    start: int
    sent: int
    arrival: int
    size: int
    received: int = -1
    begin: int = -1
    end: int = -1
    computed: int = -1
    left: int = -1
    late_calls: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Activation:
    """Hidden states ``[rows, hidden]`` as raw little-endian bytes.

    ``compression`` is ``none``, or what ``compression.py`` made of them: ``rows`` float32 scales, then a byte for each
    element. ``dtype`` is what they were, and will be, outside.
    """

    dtype: str
    shape: tuple[int, int]
    data: bytes | memoryview
    compression: Compression = "none"


@dataclass(frozen=True, slots=True)
class OpenFrame:
    """Every stage prepares the session: so many KV cells, so many sequences, and how the last stage picks tokens.

    ``origins``: the runs are those of an emulated cluster, whose time 0 this is on each stage's clock, in seconds.
    """

    session: Session
    kv_cells: int
    sequences: int
    sampling: Sampling
    origins: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class RunFrame:
    """A run on its way; the first stage gets no activation, and a void one keeps only what the cell tables need."""

    session: Session
    run: Run
    activation: Activation | None = None
    void: bool = False
    stamps: tuple[StageStamp, ...] = ()
    hops: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True)
class ResultFrame:
    """A run comes home: one predicted token per output row, ``None`` if it was void; and every stage's stamp.

    ``hops``: of an emulated cluster; the last one leads home.
    """

    session: Session
    run_id: int
    predictions: tuple[int, ...] | None
    stamps: tuple[StageStamp, ...]
    hops: tuple[Hop, ...] = ()


@dataclass(frozen=True, slots=True)
class ReleaseFrame:
    """The session is over: every stage forgets its cells."""

    session: Session


Frame = OpenFrame | RunFrame | ResultFrame | ReleaseFrame

_Index = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Stop = Annotated[int, msgspec.Meta(ge=0, le=END)]
_Rows = msgspec.Meta(max_length=MAX_ROWS)


class _Copy(msgspec.Struct, array_like=True, tag="copy", forbid_unknown_fields=True):
    source: _Index
    targets: bytes
    start: _Index
    stop: _Stop


class _Remove(msgspec.Struct, array_like=True, tag="remove", forbid_unknown_fields=True):
    sequences: bytes
    start: _Index
    stop: _Stop


class _OpenMetadata(msgspec.Struct, array_like=True, forbid_unknown_fields=True, omit_defaults=True):
    kv_cells: Annotated[int, msgspec.Meta(ge=1, lt=MAX_KV_CELLS)]
    sequences: Annotated[int, msgspec.Meta(ge=1, lt=2**20)]
    sampling: Sampling
    origins: tuple[float, ...] | None = None


class _RunMetadata(msgspec.Struct, array_like=True, forbid_unknown_fields=True, omit_defaults=True):
    kind: RunKind
    tokens: Annotated[list[_Index], _Rows]
    positions: Annotated[list[_Index], _Rows]
    sequences: Annotated[list[bytes], _Rows]
    first_output_row: _Index
    operations: Annotated[list[_Copy | _Remove], _Rows]
    dtype: str
    width: _Index
    compression: Compression
    stamps: list[StageStamp]
    hops: list[Hop] = []


class _ResultMetadata(msgspec.Struct, array_like=True, forbid_unknown_fields=True, omit_defaults=True):
    predictions: Annotated[list[_Index], _Rows] | None
    stamps: list[StageStamp]
    hops: list[Hop] = []


_Metadata = TypeVar("_Metadata", _OpenMetadata, _RunMetadata, _ResultMetadata)
_encoder = msgspec.msgpack.Encoder()
_open_decoder = msgspec.msgpack.Decoder(_OpenMetadata)
_run_decoder = msgspec.msgpack.Decoder(_RunMetadata)
_result_decoder = msgspec.msgpack.Decoder(_ResultMetadata)


def encode(frame: Frame) -> bytes:
    """One frame as bytes. Raises FrameError if it would be longer than ``MAX_FRAME_BYTES``."""
    run_id, metadata, payload = 0, b"", b""
    match frame:
        case OpenFrame(_, kv_cells, sequences, sampling, origins):
            kind = FrameKind.OPEN
            metadata = _encoder.encode(_OpenMetadata(kv_cells, sequences, sampling, origins))
        case RunFrame():
            kind = FrameKind.VOID if frame.void else FrameKind.RUN
            run_id = frame.run.run_id
            if frame.run.rows > MAX_ROWS:
                raise FrameError(
                    f"run {run_id} has {frame.run.rows} tokens, at most {MAX_ROWS} fit: use a smaller prefill chunk"
                )
            metadata = _encoder.encode(_run_metadata(frame))
            payload = bytes(frame.activation.data) if frame.activation and not frame.void else b""
        case ResultFrame(_, run_id, predictions, stamps, hops):
            kind = FrameKind.RESULT
            known = None if predictions is None else list(predictions)
            metadata = _encoder.encode(_ResultMetadata(known, list(stamps), list(hops)))
        case ReleaseFrame():
            kind = FrameKind.RELEASE
    token, number, epoch = frame.session
    header = _HEADER.pack(MAGIC, VERSION, kind, token, number, epoch, run_id, len(metadata), len(payload))
    if _HEADER.size + len(metadata) + len(payload) > MAX_FRAME_BYTES:
        raise FrameError(
            f"run {run_id} needs more than {MAX_FRAME_BYTES} bytes on the wire: use a smaller prefill chunk"
        )
    return b"".join((header, metadata, payload))


def decode(data: bytes, admits: Callable[[bytes], bool] | None = None) -> Frame:
    """The frame that ``data`` holds; an activation refers to ``data``'s memory.

    ``admits`` is asked about the token first: nobody else may keep the reader busy with the rest of a frame.

    Raises:
        StrangerError: ``admits`` says no.
        FrameError: it is no frame of this version, is cut off, or contradicts itself; the message says how.
    """
    if len(data) < _HEADER.size:
        raise FrameError(f"{len(data)} bytes are no frame, the header alone has {_HEADER.size}")
    magic, version, kind, token, number, epoch, run_id, metadata_bytes, payload_bytes = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise FrameError(f"not a pipesim frame, it begins with {magic!r}")
    if version != VERSION:
        raise FrameError(
            f"frame version {version} is not supported, only {VERSION}: run one pipesim version everywhere"
        )
    if admits and not admits(token):
        raise StrangerError("a frame with an unknown token")
    if _HEADER.size + metadata_bytes + payload_bytes != len(data):
        raise FrameError(f"the header promises {metadata_bytes} + {payload_bytes} bytes, the frame has {len(data)}")
    session = Session(token, number, epoch)
    view = memoryview(data)
    metadata = view[_HEADER.size : _HEADER.size + metadata_bytes]
    payload = view[_HEADER.size + metadata_bytes :]
    if payload and kind != FrameKind.RUN:
        raise FrameError(f"a frame of kind {kind} carries no activation, this one brings {len(payload)} bytes")
    try:
        if kind in (FrameKind.RUN, FrameKind.VOID):
            return _run_frame(session, run_id, kind == FrameKind.VOID, _run_decoder.decode(metadata), payload)
        if kind == FrameKind.RESULT:
            result = _result_decoder.decode(metadata)
            known = None if result.predictions is None else tuple(result.predictions)
            return ResultFrame(session, run_id, known, tuple(result.stamps), tuple(result.hops))
        if kind == FrameKind.OPEN:
            opened = _open_decoder.decode(metadata)
            return OpenFrame(session, opened.kv_cells, opened.sequences, opened.sampling, opened.origins)
    except (msgspec.DecodeError, BadInputError, ValueError) as error:
        raise FrameError(f"bad metadata in a frame of kind {kind}, run {run_id}: {error}") from error
    if kind == FrameKind.RELEASE and not metadata:
        return ReleaseFrame(session)
    raise FrameError(f"frame kind {kind} is unknown or has {len(metadata)} bytes of metadata too many")


def _set_bytes(sequences: int) -> bytes:
    return sequences.to_bytes((sequences.bit_length() + 7) // 8, "little")


def _set_from(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _run_metadata(frame: RunFrame) -> _RunMetadata:
    run, activation = frame.run, None if frame.void else frame.activation
    return _RunMetadata(
        kind=run.kind,
        tokens=list(run.tokens),
        positions=list(run.positions),
        sequences=[_set_bytes(held_by) for held_by in run.sequences],
        first_output_row=run.first_output_row,
        operations=[_encode_operation(operation) for operation in run.kv_operations],
        dtype=activation.dtype if activation else "",
        width=activation.shape[1] if activation else 0,
        compression=activation.compression if activation else "none",
        stamps=list(frame.stamps),
        hops=list(frame.hops),
    )


def _encode_operation(operation: KvOperation) -> _Copy | _Remove:
    if isinstance(operation, SequenceCopy):
        return _Copy(operation.source, _set_bytes(operation.targets), operation.start, operation.stop)
    return _Remove(_set_bytes(operation.sequences), operation.start, operation.stop)


def _decode_operation(operation: _Copy | _Remove) -> KvOperation:
    if isinstance(operation, _Copy):
        return SequenceCopy(operation.source, _set_from(operation.targets), operation.start, operation.stop)
    return SequenceRemove(_set_from(operation.sequences), operation.start, operation.stop)


def _run_frame(session: Session, run_id: int, void: bool, metadata: _RunMetadata, payload: memoryview) -> RunFrame:
    run = Run(
        run_id=run_id,
        epoch=session.epoch,
        kind=metadata.kind,
        tokens=tuple(metadata.tokens),
        positions=tuple(metadata.positions),
        sequences=tuple(_set_from(held_by) for held_by in metadata.sequences),
        first_output_row=metadata.first_output_row,
        kv_operations=tuple(_decode_operation(operation) for operation in metadata.operations),
    )
    activation = None
    if metadata.dtype or metadata.width or metadata.compression != "none" or payload:
        activation = Activation(metadata.dtype, (run.rows, metadata.width), payload, metadata.compression)
        _check_activation(run_id, activation)
    return RunFrame(session, run, activation, void, tuple(metadata.stamps), tuple(metadata.hops))


def _check_activation(run_id: int, activation: Activation) -> None:
    dtype, compression, (rows, width), data = (
        activation.dtype,
        activation.compression,
        activation.shape,
        activation.data,
    )
    if dtype not in ITEM_BYTES:
        raise FrameError(f"run {run_id}: dtype {dtype!r} is none of {', '.join(ITEM_BYTES)}")
    row_bytes = width * ITEM_BYTES[dtype] if compression == "none" else width + SCALE_BYTES
    if not width or rows * row_bytes != len(data):
        form = dtype if compression == "none" else compression
        raise FrameError(f"run {run_id}: {rows} x {width} {form} are {rows * row_bytes} bytes, not {len(data)}")
    if compression != "none":
        scales, codes = struct.unpack_from(f"<{rows}f", data), bytes(data[rows * SCALE_BYTES :])
        if not all(math.isfinite(scale) and scale >= 0 for scale in scales):
            raise FrameError(f"run {run_id}: a row's scale is negative or not finite")
        if compression == "fp8" and (_FP8_NAN in codes or _FP8_NAN | 0x80 in codes):
            raise FrameError(f"run {run_id}: an element is not a number")
