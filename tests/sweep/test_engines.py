import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from pipesim.errors import BadInputError, PipesimError
from pipesim.sweep.engines import find_engine, run_local


def halve(item: int) -> float:
    if item == 3:
        raise ValueError("three is odd")
    if item == 5:
        raise BadInputError("item: 5 is not wanted")
    if item == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 9:
        os._exit(4)
    return item / 2


class Unloadable:
    """Cannot be read in another process."""

    def __reduce__(self) -> Any:
        return os._exit, (6,)

    def __call__(self, item: int) -> int:
        return item


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_raises_or_kills_its_worker_costs_one_item(jobs: int) -> None:
    done = list(run_local(halve, range(12), jobs))
    assert sorted(index for index, _, _ in done) == list(range(12))
    assert {i: value for i, value, error in done if error is None} == {
        i: i / 2 for i in range(12) if i not in (3, 5, 7, 9)
    }
    assert {i: error for i, _, error in done if error} == {
        3: "ValueError: three is odd",
        5: "item: 5 is not wanted",
        7: "its worker process died (killed by SIGKILL; perhaps memory ran out)",
        9: "its worker process died (exit status 4)",
    }


def test_workers_that_cannot_start_are_one_error_and_no_hang() -> None:
    with pytest.raises(PipesimError, match=r"cannot be started \(exit status 6\)"):
        list(run_local(Unloadable(), range(100), 2))


def test_nothing_to_do_starts_no_process() -> None:
    assert list(run_local(halve, [], 4)) == []


def test_workers_end_with_whoever_started_them() -> None:
    """Also if it is killed."""
    script = (
        "import os, signal, multiprocessing as m\n"
        "from pipesim.sweep.engines import run_local\n"
        "if __name__ == '__main__':\n"
        "    done = run_local(abs, range(8), 2)\n"
        "    next(done)\n"
        "    print(*(p.pid for p in m.active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    pids = [int(pid) for pid in ended.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_ctrl_c_is_for_whoever_started_the_workers() -> None:
    """From the first worker of a process on."""
    script = (
        "import functools, signal\n"
        "from pipesim.sweep.engines import run_local\n"
        "if __name__ == '__main__':\n"
        "    ((_, blocked, _),) = run_local(functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK), [[]], 1)\n"
        "    print(signal.SIGINT in blocked, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout.split() == ["True", "False"], ended.stderr


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(BadInputError, match="use one of local, ray"):
        find_engine("spark")
