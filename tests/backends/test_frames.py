"""The wire format: what goes in comes out, and nothing malformed comes through."""

import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.frames import (
    MAX_FRAME_BYTES,
    MAX_KV_CELLS,
    MAX_ROWS,
    TOKEN_BYTES,
    VERSION,
    Activation,
    Frame,
    FrameError,
    FrameKind,
    OpenFrame,
    ReleaseFrame,
    ResultFrame,
    RunFrame,
    Session,
    StageStamp,
    StrangerError,
    decode,
    encode,
)
from backends.sampling import Sampling
from pipesim.scheduling.runs import END, Run, RunKind, SequenceCopy, SequenceRemove

SESSION = Session(b"t" * TOKEN_BYTES, 7, 2)
HEADER = struct.Struct("<4sBB2x16sQIQII")

index = st.integers(0, 2**31 - 1)
sequence_set = st.integers(0, 2**300)
stamps = st.lists(
    st.builds(StageStamp, index, st.floats(0, 1e9), st.floats(0, 1e9), st.booleans(), index), max_size=9
).map(tuple)
operations = st.one_of(
    st.builds(SequenceCopy, index, sequence_set, index, st.integers(0, END)),
    st.builds(SequenceRemove, sequence_set, index, st.integers(0, END)),
)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    rows = draw(st.integers(1, 9))

    def per_row(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(st.lists(values, min_size=rows, max_size=rows)))

    return Run(
        run_id=draw(st.integers(0, 2**63)),
        epoch=SESSION.epoch,
        kind=draw(st.sampled_from(RunKind)),
        tokens=per_row(index),
        positions=per_row(index),
        sequences=per_row(sequence_set),
        first_output_row=draw(st.integers(0, rows)),
        kv_operations=tuple(draw(st.lists(operations, max_size=4))),
    )


@st.composite
def plain_activations(draw: st.DrawFn, rows: int) -> Activation:
    dtype, size = draw(st.sampled_from([("float32", 4), ("bfloat16", 2)]))
    width = draw(st.integers(1, 5))
    count = rows * width * size
    return Activation(dtype, (rows, width), draw(st.binary(min_size=count, max_size=count)))


@st.composite
def compressed_activations(draw: st.DrawFn, rows: int) -> Activation:
    compression = draw(st.sampled_from(["fp8", "int8"]))
    width = draw(st.integers(1, 5))
    scales = draw(st.lists(st.floats(0, 2.0**100, width=32), min_size=rows, max_size=rows))
    codes = draw(st.lists(st.integers(0, 255).filter(lambda code: code & 127 != 127), min_size=5, max_size=5))
    data = struct.pack(f"<{rows}f", *scales) + bytes(codes[:width]) * rows
    return Activation(draw(st.sampled_from(["float32", "bfloat16"])), (rows, width), data, compression)


@st.composite
def run_frames(draw: st.DrawFn) -> RunFrame:
    run, void = draw(runs()), draw(st.booleans())
    activation = None
    if not void and draw(st.booleans()):
        activation = draw(st.one_of(plain_activations(run.rows), compressed_activations(run.rows)))
    return RunFrame(SESSION, run, activation, void, draw(stamps))


frames = st.one_of(
    run_frames(),
    st.builds(ResultFrame, st.just(SESSION), index, st.none() | st.lists(index, max_size=9).map(tuple), stamps),
    st.builds(
        OpenFrame,
        st.just(SESSION),
        st.integers(1, 9999),
        st.integers(1, 999),
        st.builds(Sampling, st.just(0.0) | st.floats(1e-3, 9), index, st.floats(0.01, 1), st.integers(0, 2**64 - 1)),
    ),
    st.just(ReleaseFrame(SESSION)),
)


def a_run(**changes: object) -> Run:
    fields = {"run_id": 3, "epoch": 2, "kind": RunKind.SPECULATIVE, "tokens": (5, 6), "positions": (8, 9)}
    return Run(**(fields | {"sequences": (1, 2)} | changes))  # type: ignore[arg-type]


def a_run_frame() -> bytes:
    return encode(RunFrame(SESSION, a_run(), Activation("float32", (2, 4), bytes(32))))


@given(frames)
@settings(max_examples=300, deadline=None)
def test_what_goes_in_comes_out(frame: Frame) -> None:
    assert decode(encode(frame)) == frame


def test_sequence_sets_have_any_size() -> None:
    run = a_run(sequences=(1 << 5000, (1 << 70000) - 1))
    decoded = decode(encode(RunFrame(SESSION, run)))
    assert isinstance(decoded, RunFrame)
    assert decoded.run.sequences == run.sequences


def test_a_void_frame_keeps_the_metadata_and_drops_the_activation() -> None:
    frame = decode(encode(RunFrame(SESSION, a_run(), Activation("float32", (2, 1), bytes(8)), void=True)))
    assert frame == RunFrame(SESSION, a_run(), None, void=True)


@given(st.binary(max_size=300))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode(data)


@given(run_frames(), st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_frames_are_refused_or_still_sound(frame: RunFrame, data: st.DataObject) -> None:
    """A flipped byte may give another valid frame, but never anything else than a frame or a FrameError."""
    raw = bytearray(encode(frame))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(raw))
    except FrameError:
        return
    assert decode(encode(decoded)) == decoded


@given(st.integers(0, 400))
def test_cut_off_frames_are_refused(length: int) -> None:
    whole = a_run_frame()
    with pytest.raises(FrameError):
        decode(whole[: min(length, len(whole) - 1)])


def _with_header(data: bytes, **changes: object) -> bytes:
    names = ("magic", "version", "kind", "token", "number", "epoch", "run_id", "metadata", "payload")
    fields = dict(zip(names, HEADER.unpack_from(data), strict=True)) | changes
    return HEADER.pack(*fields.values()) + data[HEADER.size :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"HTTP"}, "not a pipesim frame"),
        ({"version": VERSION + 1}, "version"),
        ({"kind": 0}, "kind 0 is unknown|carries no activation"),
        ({"kind": 99}, "carries no activation"),
        ({"kind": FrameKind.VOID}, "carries no activation"),
        ({"kind": FrameKind.RELEASE}, "carries no activation"),
        ({"metadata": 2**32 - 1}, "promises"),
        ({"payload": 0}, "promises"),
        ({"payload": 2**32 - 1}, "promises"),
    ],
)
def test_a_wrong_header_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(_with_header(a_run_frame(), **changes))


def _with_metadata(metadata: object, payload: bytes = b"", kind: int = FrameKind.RUN) -> bytes:
    packed = msgspec.msgpack.encode(metadata)
    header = HEADER.pack(b"PSIM", VERSION, kind, *SESSION, 3, len(packed), len(payload))
    return header + packed + payload


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        [],
        ["prefill"],
        ["unheard-of", [1], [1], [b"\1"], 0, [], "", 0, "none", []],
        ["prefill", [], [], [], 0, [], "", 0, "none", []],
        ["prefill", [1], [1, 2], [b"\1"], 0, [], "", 0, "none", []],
        ["prefill", [-1], [1], [b"\1"], 0, [], "", 0, "none", []],
        ["prefill", [1], [2**31], [b"\1"], 0, [], "", 0, "none", []],
        ["prefill", ["1"], [1], [b"\1"], 0, [], "", 0, "none", []],
        ["prefill", [1], [1], [1], 0, [], "", 0, "none", []],
        ["prefill", [1], [1], [b"\1"], 2, [], "", 0, "none", []],
        ["prefill", [1], [1], [b"\1"], 0, [["burn", 0, b"\1", 0, 1]], "", 0, "none", []],
        ["prefill", [1], [1], [b"\1"], 0, [["copy", 0, b"\1", -1, 1]], "", 0, "none", []],
        ["prefill", [1], [1], [b"\1"], 0, [], "", 4, "none", []],
        ["prefill", [1], [1], [b"\1"], 0, [], "float64", 4, "none", []],
        ["prefill", [1], [1], [b"\1"], 0, [], "float32", 4, "none", []],
        ["prefill", [1], [1], [b"\1"], 0, [], "float32", 0, "none", []],
        ["prefill", [1], [1], [b"\1"], 0, [], "", 0, "none", [[0, 1.0]]],
        ["prefill", [1], [1], [b"\1"], 0, [], "", 0, "fp8", []],
        ["prefill", [1], [1], [b"\1"], 0, [], "", 0, "none", [], "more"],
    ],
)
def test_bad_metadata_is_refused(metadata: object) -> None:
    with pytest.raises(FrameError):
        decode(_with_metadata(metadata))


def test_the_activation_must_have_the_size_that_it_claims() -> None:
    good = ["canonical", [1], [1], [b"\1"], 0, [], "float32", 4, "none", []]
    assert decode(_with_metadata(good, bytes(16)))
    for size in (15, 17, 32):
        with pytest.raises(FrameError, match="bytes, not"):
            decode(_with_metadata(good, bytes(size)))


def _compressed(payload: bytes, compression: object = "fp8", width: int = 3) -> bytes:
    """Of two rows."""
    metadata = ["canonical", [1, 1], [1, 2], [b"\1"] * 2, 0, [], "bfloat16", width, compression, []]
    return _with_metadata(metadata, payload)


@pytest.mark.parametrize("compression", ["fp8", "int8"])
def test_compressed_activations_are_checked_to_the_last_byte(compression: str) -> None:
    scales = struct.pack("<2f", 0.5, 0.0)
    assert decode(_compressed(scales + bytes(6), compression))
    for size in (0, 5, 7, 12):
        with pytest.raises(FrameError, match="bytes, not"):
            decode(_compressed(scales + bytes(size), compression))
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(FrameError, match="scale is negative or not finite"):
            decode(_compressed(struct.pack("<2f", 1.0, scale) + bytes(6), compression))
    with pytest.raises(FrameError, match="bytes, not"):
        decode(_compressed(scales, compression, width=0))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_what_is_not_a_number_does_not_come_through(code: int) -> None:
    payload = struct.pack("<2f", 1.0, 1.0) + bytes(5) + bytes([code])
    assert decode(_compressed(payload, "int8"))
    with pytest.raises(FrameError, match="not a number"):
        decode(_compressed(payload, "fp8"))


@pytest.mark.parametrize("compression", ["zip", None, 8, ""])
def test_an_unknown_compression_is_refused(compression: object) -> None:
    with pytest.raises(FrameError):
        decode(_compressed(bytes(14), compression))


def test_settings_out_of_range_do_not_open_a_session() -> None:
    sampling = {"temperature": -1.0, "top_k": 0, "top_p": 1.0, "seed": 0}
    for metadata in (
        [0, 1, sampling | {"temperature": 0.0}],
        [1, 0, sampling | {"temperature": 0.0}],
        [1, 1, sampling],
        [MAX_KV_CELLS, 1, sampling | {"temperature": 0.0}],
    ):
        with pytest.raises(FrameError):
            decode(_with_metadata(metadata, kind=FrameKind.OPEN))


def test_a_run_has_a_bounded_number_of_rows() -> None:
    def rows(count: int) -> dict[str, tuple[int, ...]]:
        return {"tokens": (1,) * count, "positions": (1,) * count, "sequences": (1,) * count}

    assert decode(encode(RunFrame(SESSION, a_run(**rows(MAX_ROWS)))))
    with pytest.raises(FrameError, match="smaller prefill chunk"):
        encode(RunFrame(SESSION, a_run(**rows(MAX_ROWS + 1))))
    many = [1] * (MAX_ROWS + 1)
    with pytest.raises(FrameError, match="length"):
        decode(_with_metadata(["prefill", many, many, [b"\1"] * len(many), 0, [], "", 0, "none", []]))


def test_a_stranger_is_turned_away_before_the_rest_of_a_frame_is_read() -> None:
    asked: list[bytes] = []

    def nobody(token: bytes) -> bool:
        asked.append(token)
        return False

    whole = a_run_frame()
    for data in (whole, whole[: HEADER.size]):
        with pytest.raises(StrangerError):
            decode(data, nobody)
    assert asked == [SESSION.token] * 2
    for data in (b"", whole[: HEADER.size - 1], b"X" + whole, _with_header(whole, version=VERSION + 1)):
        with pytest.raises(FrameError):
            decode(data, nobody)


def test_what_cannot_be_sent_is_not_encoded() -> None:
    with pytest.raises(FrameError, match="smaller prefill chunk"):
        encode(RunFrame(SESSION, a_run(), Activation("float32", (2, 1), bytes(MAX_FRAME_BYTES))))
