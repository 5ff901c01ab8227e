"""Chance as a pure function of (seed, stream, index): nothing depends on what was drawn before (invariant I8)."""

import hashlib

_MASK = 2**64 - 1


def mix(value: int) -> int:
    """64 well-mixed bits (splitmix64's finalizer: Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def unit(bits: int) -> float:
    """Uniform in [0, 1)."""
    return (bits >> 11) * 2.0**-53


def stream(seed: int, name: str) -> int:
    """Where a subsystem's draws begin: draw ``i`` of the stream is ``mix(stream(seed, name) + i)``."""
    named = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
    return mix(seed & _MASK ^ named)
