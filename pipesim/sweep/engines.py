"""Where a sweep's points are computed: processes of this machine, or a Ray cluster.

An engine takes a function, items, and how many to compute at once, and yields ``(index, value, error)`` in whatever
order they get done: ``error`` is None, or says why there is no value. A function that raises, or a process that dies,
costs one item and no other.
"""

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any

from pipesim.errors import BadInputError, PipesimError

Function = Callable[[Any], Any]
Done = tuple[int, Any, str | None]
Engine = Callable[[Function, Sequence[Any], int | None], Iterator[Done]]

_AHEAD = 2
"""Items that a worker has at hand, so that it never waits for the next one to arrive."""


def find_engine(name: str) -> Engine:
    """The engine of that name. Raises BadInputError for an unknown one."""
    engines: dict[str, Engine] = {"local": run_local, "ray": run_ray}
    if name not in engines:
        raise BadInputError(f"--engine {name}: there is no such engine, use one of {', '.join(engines)}")
    return engines[name]


def attempt(function: Function, index: int, item: Any) -> Done:
    """One item, computed here and now."""
    try:
        return index, function(item), None
    except PipesimError as problem:
        return index, None, str(problem)
    except Exception as problem:
        return index, None, f"{type(problem).__name__}: {problem}"


def run_local(function: Function, items: Sequence[Any], jobs: int | None = None) -> Iterator[Done]:
    """Computes on ``jobs`` processes of this machine; one per core unless a number is given.

    Processes are spawned, not forked, and end with this one, however it ends.

    Raises:
        PipesimError: processes cannot be started here.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(range(len(items)))
    jobs = min(jobs or _cores(), len(items))
    workers: dict[Any, _Worker] = {}
    try:
        while waiting or any(worker.given for worker in workers.values()):
            while waiting and len(workers) < jobs:
                worker = _Worker(context, function)
                workers[worker.connection] = worker
            for worker in workers.values():
                worker.top_up(waiting, items)
            for connection in wait(list(workers)):
                worker = workers[connection]
                try:
                    yield worker.receive()
                except (EOFError, OSError):
                    del workers[connection]
                    yield from worker.bury(waiting)
                except _Started:
                    pass
    finally:
        for worker in workers.values():
            worker.stop()


def _cores() -> int:
    """Cores that this process may use; not every system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Started(Exception):  # noqa: N818  (a message, not an error)
    pass


class _Worker:
    """A process and the indexes of the items that it was given and has not answered, oldest first."""

    def __init__(self, context: SpawnContext, function: Function) -> None:
        self.connection, theirs = context.Pipe()
        self.given: deque[int] = deque()
        self.started = False
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        # Ctrl-C reaches every process of a terminal; it is this one that has to answer it. The tracker, which would
        # start with the first worker, unblocks signals in passing.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def top_up(self, waiting: deque[int], items: Sequence[Any]) -> None:
        while waiting and len(self.given) < _AHEAD:
            try:
                self.connection.send((waiting[0], items[waiting[0]]))
            except OSError:  # it died: receiving says so, too
                return
            self.given.append(waiting.popleft())

    def receive(self) -> Done:
        message: Done | None = self.connection.recv()
        if message is None:
            self.started = True
            raise _Started
        self.given.remove(message[0])
        return message

    def bury(self, waiting: deque[int]) -> Iterator[Done]:
        """After its death: the item in its hands has failed, those after it go back."""
        self.connection.close()
        self.process.join()
        code = self.process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if not self.started:
            raise PipesimError(f"worker processes cannot be started ({how}): see their message above")
        if self.given:
            memory = "; perhaps memory ran out" if code == -signal.SIGKILL else ""
            yield self.given.popleft(), None, f"its worker process died ({how}{memory})"
        waiting.extendleft(reversed(self.given))

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _serve(connection: Connection, function: Function) -> None:
    """A worker's life: ends with the connection."""
    try:
        connection.send(None)
        while True:
            index, item = connection.recv()
            connection.send(attempt(function, index, item))
    except (EOFError, OSError):
        return


def run_ray(function: Function, items: Sequence[Any], jobs: int | None = None) -> Iterator[Done]:
    """Computes on a Ray cluster: the one that Ray finds (``RAY_ADDRESS``), or one that it starts on this machine.

    ``jobs`` bounds the items in flight; without it the cluster is kept busy. pipesim has to be installed on its nodes.

    Raises:
        PipesimError: ray is not installed, or its cluster cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise PipesimError("--engine ray: ray is not installed, use pip install 'pipesim[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as problem:
            raise PipesimError(f"--engine ray: no cluster ({problem})") from None
    remote = ray.remote(max_retries=0)(attempt)
    limit = jobs or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque(range(len(items)))
    flying: dict[Any, int] = {}
    try:
        while waiting or flying:
            while waiting and len(flying) < limit:
                index = waiting.popleft()
                flying[remote.remote(function, index, items[index])] = index
            (done, *_), _ = ray.wait(list(flying))
            index = flying.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError as problem:
                yield index, None, f"a Ray worker could not take it up: {problem.cause}"
            except ray.exceptions.RayError as problem:
                yield index, None, f"its worker process died ({type(problem).__name__})"
    finally:
        if ours:
            ray.shutdown()
