"""What lies in the memory of devices, and what does not fit."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Load:
    """What one stage, or the draft model, needs of the memory of its device, or of each of its devices.

    Attributes:
        user: for messages.
        device: the shared device; None for a machine of its own.
        needed: bytes.
        available: bytes of the device's memory; None without limit.
    """

    user: str
    device: str | None
    needed: float
    available: float | None


def limit(loads: Iterable[Load]) -> float:
    """Memory of the device on which the loads lie, infinite without limit."""
    return min((load.available for load in loads if load.available is not None), default=float("inf"))


def memory_problems(loads: Iterable[Load]) -> Iterator[str]:
    """One line for each device, shared or a user's own, that cannot hold what lies on it."""
    together: defaultdict[tuple[str | None, str], list[Load]] = defaultdict(list)
    for load in loads:
        together[load.device, load.user if load.device is None else ""].append(load)
    for (device, _), users in together.items():
        needed, available = sum(load.needed for load in users), limit(users)
        if needed > available:
            names = ", ".join(load.user for load in users) + (f" on {device!r}" if device is not None else "")
            yield (
                f"cluster: {names}: weights and KV cells need {needed / _GIB:.2f} GiB of each device, "
                f"{available / _GIB:.2f} GiB are available, {(needed - available) / _GIB:.2f} GiB too few: "
                "use more or larger devices, or a smaller quantization"
            )
