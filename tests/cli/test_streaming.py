"""The text on a screen, as it comes."""

import io
from unittest import mock

import pytest
from rich.console import Console
from rich.live import Live

from pipesim.cli.streaming import TextScreen
from pipesim.executors import Progress


def test_a_line_without_end_is_not_drawn_whole_with_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = io.StringIO()
    live = Live(console=Console(file=drawn, force_terminal=True, width=80), transient=True, auto_refresh=False)
    with live, mock.patch("sys.stdout.isatty", return_value=True):
        screen = TextScreen(live)
        for number in range(1000):
            screen.show(Progress(f"word{number} ", number, None))
        before = len(drawn.getvalue())
        screen.show(Progress("last", 1001, None))
        one_more = drawn.getvalue()[before:]
    assert "last" in one_more
    assert "word1 " not in one_more
    assert len(one_more) < 2000
    screen._finish()
    assert capsys.readouterr().out == "".join(f"word{number} " for number in range(1000)) + "last"
