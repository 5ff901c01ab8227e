"""The recorded traces that come with pipesim, and the page that describes them: docs/acceptance.md."""

import re
from itertools import groupby
from pathlib import Path
from statistics import fmean

import pytest
from scenario_builder import build

from pipesim.acceptance_trace import AcceptanceTrace, read_acceptance_trace
from pipesim.metrics import compute_metrics
from pipesim.simulation.pipeline import simulate

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "acceptance.md").read_text(encoding="utf-8")
TRACES = sorted((ROOT / "scenarios" / "traces").glob("*.json"))
ROWS = dict(re.findall(r"^\| (\S+\.json) \| (.*) \|$", PAGE, re.MULTILINE))


def described(path: Path, real: str) -> str:
    """The row of the page's table, but for what the real run's own count of its acceptance was."""
    trace = read_acceptance_trace(path)
    acceptance = f"acceptance={{kind: trace, file: {path}}}"
    metrics = compute_metrics(simulate(build(acceptance, "workload={max_new_tokens: 256}", "policy.name=speculative")))
    pairs = list(zip(trace.candidates, trace.tokens, strict=True))
    hits = [ranked[:1] != () and ranked[0][0] == token for ranked, token in pairs]
    second = [
        len(ranked) > 1 and ranked[1][0] == token for (ranked, token), hit in zip(pairs, hits, strict=True) if not hit
    ]
    stretches = [(hit, len(list(stretch))) for hit, stretch in groupby(hits)]
    in_a_row = [fmean(length for hit, length in stretches if hit is wanted) for wanted in (True, False)]
    figures = (metrics.acceptance_rate, fmean(hits), fmean(second))
    return " | ".join([real, *(f"{figure:.3f}" for figure in figures), *(f"{length:.1f}" for length in in_a_row)])


def test_every_trace_is_on_the_page() -> None:
    assert TRACES
    assert {path.name for path in TRACES} == ROWS.keys()


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_the_page_says_what_is_in_a_trace_and_what_simulation_makes_of_it(path: Path) -> None:
    real, simulated, *_ = ROWS[path.name].split(" | ")
    assert ROWS[path.name] == described(path, real)
    assert float(simulated) == pytest.approx(float(real), abs=0.01)


def test_the_example_on_the_page_is_a_trace() -> None:
    (example,) = re.findall(r"^    (\{\n.*?\n    \})$", PAGE, re.MULTILINE | re.DOTALL)
    assert AcceptanceTrace.model_validate_json(example).stop_tokens == (2,)
