"""Compiles ``kernels.cpp`` with the machine's compiler, once per user and machine, and calls it through ctypes.

ctypes lets other Python threads run during a call.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipesim.errors import BadInputError

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-w")
_TUNED = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
"""Tried in this order: not every compiler knows all."""

_COMPILE_TIMEOUT_S = 600  # a busy machine takes minutes
VERSION = 1
"""Of what the functions take."""

Int, Float, Pointer = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class Matrix(ctypes.Structure):
    """See ``kernels.cpp``, as of all structures here."""

    _fields_ = (
        ("codes", Pointer),
        ("scales", Pointer),
        ("mins", Pointer),
        ("format", Int),
        ("outputs", Int),
        ("inputs", Int),
        ("block", Int),
        ("half_scales", Int),
        ("zero", Int),
    )


class Config(ctypes.Structure):
    """Sizes and constants."""

    _fields_ = (
        *((name, Int) for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "gelu")),
        ("round_hidden", Int),
        ("threads", Int),
        ("norm_eps", Float),
        ("query_scale", Float),
    )


class Layer(ctypes.Structure):
    """Weights of a layer; vectors are float32, null where the family has none."""

    _fields_ = (
        *((name, Matrix) for name in ("qkv", "output", "gate_up", "down")),
        *((name, Pointer) for name in ("attention_norm", "qkv_bias", "qk_norm", "post_attention_norm")),
        *((name, Pointer) for name in ("mlp_norm", "post_mlp_norm")),
    )


class Rows(ctypes.Structure):
    """A run: where its rows are and what they see."""

    _fields_ = (
        ("rows", Int),
        ("prefix_count", Int),
        *((name, Pointer) for name in ("positions", "cells", "prefix", "tails", "tail_ends")),
    )


class Look(ctypes.Structure):
    """A run in layers of one kind."""

    _fields_ = (
        *((name, Int) for name in ("window", "block_count", "first_block", "last_block")),
        *((name, Pointer) for name in ("blocks", "cosines", "sines", "frequencies")),
    )


class Cells(ctypes.Structure):
    """Keys and values of a layer."""

    _fields_ = (("keys", Pointer), ("values", Pointer), ("cells", Int))


_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "pipesim_variant": (ctypes.c_char_p, ()),
    "pipesim_has_threads": (Int, ()),
    "pipesim_linear": (None, (Pointer, Pointer, Int, Pointer, Int)),
    "pipesim_embed": (None, (Pointer, Pointer, Int, Float, Pointer)),
    "pipesim_look": (None, (Pointer, Pointer, Pointer, Pointer)),
    "pipesim_layer": (None, (Pointer, Pointer, Pointer, Pointer, Pointer, Pointer)),
    "pipesim_head": (None, (Pointer, Pointer, Pointer, Pointer, Int, Pointer)),
}


def prepare() -> None:
    """Compiles the kernels if that was not done before: some ten seconds, more on a busy machine, as stderr is told.

    For whoever starts processes that will :func:`load` them, so that none of those is late.

    Raises:
        BadInputError: as :func:`load`.
    """
    compiler, library = _wanted()
    if not library.exists():
        with _alone_with(library):
            if not library.exists():
                _compile(compiler, library)


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels. The first of several processes compiles them, if nobody did before; the others wait for it.

    Raises:
        BadInputError: there is no compiler here, it cannot compile them, or there is no place to keep them.
    """
    compiler, library = _wanted()
    kernels = _kept(library)
    if kernels is None:
        with _alone_with(library):
            kernels = _kept(library)
            if kernels is None:
                _compile(compiler, library)
                kernels = ctypes.CDLL(str(library))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(kernels, name)
        function.restype, function.argtypes = result, arguments
    return kernels


def _wanted() -> tuple[list[str], Path]:
    """The compiler, and where what it makes of this source on this machine is kept."""
    compiler = _compiler()
    version = _run([*compiler, "--version"]).stdout
    key = hashlib.blake2b(digest_size=12)
    settings = str((_FLAGS, _TUNED))
    for part in (_SOURCE.read_text(), " ".join(compiler), version, platform.machine(), _cpu_flags(), settings):
        key.update(part.encode() + b"\0")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "pipesim"
    return compiler, cache / f"kernels-{key.hexdigest()}.so"


def _kept(library: Path) -> ctypes.CDLL | None:
    """What was compiled before; None if nothing was, or it is damaged."""
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        return None


@contextlib.contextmanager
def _alone_with(library: Path) -> Iterator[None]:
    """No other process compiles it meanwhile."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say("another process is compiling the CPU kernels, waiting for it ...")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise BadInputError(f"the kernels cannot be kept in {library.parent}: {error}") from error


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [[name] for name in ("c++", "g++", "clang++")]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise BadInputError(f"no C++ compiler: {' or '.join(' '.join(one) for one in candidates)} is not installed")


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadInputError(f"{' '.join(command[:2])} failed: {error}") from error


def _compile(compiler: list[str], library: Path) -> None:
    _say(f"compiling the CPU kernels with {compiler[0]}, once for this machine ...")
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        for tuned in _TUNED:
            done = _run([*compiler, *_FLAGS, *tuned, "-o", str(made), str(_SOURCE)])
            if done.returncode == 0:
                made.replace(library)  # whole or not at all, if this process is killed
                return
            if done.returncode < 0:  # Ctrl-C, or no memory: no other flags would help
                raise BadInputError(f"{' '.join(compiler)} was killed by signal {-done.returncode}")
    message = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    raise BadInputError(f"{' '.join(compiler)} cannot compile {_SOURCE.name}: {message[:200]}")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _cpu_flags() -> str:
    """What ``-march=native`` goes by: a home folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(dict.fromkeys(line for line in info.read_text().splitlines() if line.startswith(wanted)))
