"""What a sweep has finished, in a file that no interruption can spoil."""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipesim.errors import BadInputError, PipesimError

Figures = dict[str, Any]
"""Dotted name of a figure -> number, text or None."""


class Journal:
    """The figures of finished points by fingerprint; in memory only, or beside that in a file of JSON lines.

    A line is written as soon as its point is finished and never touched again. What a kill leaves of a last line
    is cut off when the file is opened next.
    """

    def __init__(self, path: Path = Path(), file: Any = None, finished: dict[str, Figures] | None = None) -> None:
        self._path, self._file = path, file
        self.finished = finished or {}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path | None) -> Iterator["Journal"]:
        """Reads what is in the file and holds it open, alone, for more.

        Raises:
            BadInputError: the file is no journal, or another sweep writes to it now.
            PipesimError: it cannot be read or written.
        """
        if path is None:
            yield cls()
            return
        with contextlib.ExitStack() as stack:
            with _failures(path):
                file = stack.enter_context(path.open("ab+", buffering=0))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise BadInputError(f"{path}: another sweep writes to it, wait for it or use another -o") from None
                finished = _read(path, file)
            yield cls(path, file, finished)

    def add(self, point: str, figures: Figures) -> None:
        """Remembers a finished point; it is in the file when this returns."""
        self.finished[point] = figures
        if self._file:
            line = json.dumps({"point": point, "figures": figures}).encode() + b"\n"
            with _failures(self._path):
                while line:
                    line = line[self._file.write(line) :]


@contextlib.contextmanager
def _failures(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise PipesimError(f"{path}: {problem.strerror}: the sweep's journal has to be read and written") from None


def _read(path: Path, file: Any) -> dict[str, Figures]:
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    finished = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            entry = json.loads(line)
            finished[entry["point"]] = entry["figures"]
        except (ValueError, KeyError, TypeError):
            raise BadInputError(f"{path}:{number}: not a line of a sweep's journal: remove the file") from None
    file.truncate(whole)
    return finished
