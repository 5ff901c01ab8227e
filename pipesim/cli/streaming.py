"""Shows text while it is generated: the text on stdout, a line of figures on stderr if that is a terminal."""

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipesim.cli.common import printing
from pipesim.executors import Progress

_SHOWN = 400
"""Characters of an unfinished line that are shown at most: the whole is drawn anew with every token."""


class TextScreen:
    """Takes pieces of text as they come.

    Where both streams are the same terminal, finished lines scroll above the figures and the unfinished one waits
    just above them (of a long one, its end); at the end, also after Ctrl-C, the figures disappear and the text stays.
    """

    def __init__(self, live: Live | None) -> None:
        self._live = live
        self._shared = live is not None and sys.stdout.isatty()
        self._first: float | None = None
        self._line = ""

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator["TextScreen"]:
        """A screen; whatever happens within, all text given to it is on stdout afterwards."""
        if not sys.stderr.isatty():
            yield cls(None)
            return
        console = Console(stderr=True)
        with contextlib.ExitStack() as stack:
            live = Live(console=console, transient=True, auto_refresh=False, redirect_stdout=False)
            screen = cls(live)
            stack.callback(screen._finish)
            stack.enter_context(live)
            yield screen

    def show(self, progress: Progress) -> None:
        """Adds a piece of text and brings the figures up to date. Raises PipesimError if stdout takes no more."""
        if self._live is None:
            _print(progress.text)
            return
        if self._shared:
            *lines, self._line = (self._line + progress.text).split("\n")
            for line in lines:
                self._live.console.print(Text(line), soft_wrap=True)
        else:
            _print(progress.text)
        figures = Text(self._figures(progress), style="dim")
        line = self._line if len(self._line) <= _SHOWN else f"…{self._line[-_SHOWN:]}"
        self._live.update(Group(Text(line), figures) if self._shared else figures, refresh=True)

    def _figures(self, progress: Progress) -> str:
        now = time.monotonic()
        if self._first is None or progress.tokens < 2:
            self._first = now
            return f"{progress.tokens} tokens"
        shown = f"{progress.tokens} tokens, {(progress.tokens - 1) / max(1e-9, now - self._first):.1f} tokens/s"
        rate = progress.acceptance_rate
        return shown if rate is None else f"{shown}, {rate:.0%} of drafted tokens accepted"

    def _finish(self) -> None:
        """After the figures are gone: the line that was still growing."""
        _print(self._line)


def _print(text: str) -> None:
    with printing():
        print(text, end="")
