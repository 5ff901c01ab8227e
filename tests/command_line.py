"""pipesim's commands as users call them, in processes of their own."""

import json
import subprocess
import sys
from typing import Any

PROMPT = " ".join(f"w{3 + i % 7}" for i in range(30))
"""What a talker hears: see ``talker.py``."""


def command(*arguments: object) -> list[str]:
    """What a shell would be told."""
    return [sys.executable, "-c", "from pipesim.cli import main; main()", *map(str, arguments)]


def as_json(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    """The object that a command printed with ``--json``."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "stdout must hold one JSON object and nothing else"
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed
