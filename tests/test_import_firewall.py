"""Which package may import what: the scheduler stays pure, and pipesim never needs the real executor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN_IN_SCHEDULING = {
    "time", "datetime", "random", "secrets", "asyncio", "threading", "socket", "os", "simpy", "grpc", "torch",
    "numpy", "backends", "analysis",
}  # fmt: skip


def imported_by(path: Path) -> set[str]:
    """All modules that a file imports anywhere, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names.add(node.module or "")
    return names


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"no files below {package}: the firewall watches nothing"
    return found


@pytest.mark.parametrize("path", files("pipesim/scheduling"), ids=lambda p: p.stem)
def test_scheduling_has_no_clock_no_randomness_no_io(path: Path) -> None:
    for name in imported_by(path):
        assert name.split(".")[0] not in FORBIDDEN_IN_SCHEDULING, f"{path} imports {name}"
        if name.startswith("pipesim"):
            assert name.startswith("pipesim.scheduling") or name == "pipesim.errors", f"{path} imports {name}"


@pytest.mark.parametrize("path", files("pipesim"), ids=lambda p: str(p.relative_to(ROOT)))
def test_pipesim_never_imports_backends_or_their_libraries(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported_by(path)} & {"backends", "torch", "grpc"}


OF_BOTH_WORLDS = ["event_log", "metrics", "perfetto", "recorder", "scenario_file", "trace"]
SHARED = [*(ROOT / "pipesim" / f"{name}.py" for name in OF_BOTH_WORLDS), *files("pipesim/scenario")]


@pytest.mark.parametrize("path", SHARED, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_both_worlds_share_does_not_know_the_simulation(path: Path) -> None:
    imported = imported_by(path)
    assert not any(module.startswith(("pipesim.simulation", "pipesim.cli", "simpy", "analysis")) for module in imported)


@pytest.mark.parametrize("path", files("pipesim/simulation"), ids=lambda p: p.stem)
def test_the_simulation_does_not_know_the_command_line_or_plots(path: Path) -> None:
    assert not any(name.startswith(("pipesim.cli", "analysis")) for name in imported_by(path))


def test_importing_the_scheduler_loads_nothing_heavy() -> None:
    script = "import pipesim.scheduling.scheduler, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "grpc", "simpy", "numpy", "pandas", "pydantic"} & set(loaded)
