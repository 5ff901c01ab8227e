"""The accuracy gate: predictions may not get worse.

The recorded half holds the simulator against docs/fidelity.json: measured costs and measured runs of this project's own
machine. It is arithmetic, so a loaded machine cannot fail it. Runs were made by the scheduler of their day: where that
has changed since, plain decoding alone can be held against them, and the page wants to be made anew.

The live half (slow) measures costs and real runs in turns, on whatever machine this is. Its tolerance is a margin
beside the runs' own spread; where they spread so much that they could confirm anything, or where others used the
processors meanwhile, it is skipped, and says so.
"""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from pipelines import LAYERS
from talker import save_talker

from analysis.fidelity import scheduling_digest
from pipesim.comparison import NOISY, calibrated, compare, flat_metrics, make_figure, predict, spread_share
from pipesim.event_log import replay
from pipesim.executors import find_executor
from pipesim.scenario import TraceAcceptance
from pipesim.scenario_file import build_scenario

RECORDED = json.loads((Path(__file__).parent.parent / "docs" / "fidelity.json").read_text(encoding="utf-8"))
MARGIN = 0.02
"""So much may the error of recorded tokens/s grow: a fifth of what recorded runs spread by, in the middle setting."""
LIVE_MARGIN = 0.15
"""Of tokens/s, beside the spread of the live runs: it catches a model that is wrong, not one that is a little off."""
OTHERS = 0.1
"""Somebody else's share of the processors that makes live figures theirs as well."""
LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}  # most of the time is its layers'


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda one: one["setting"])
def test_predictions_of_recorded_runs_do_not_get_worse(recorded: dict[str, Any]) -> None:
    if recorded["policy"] != "autoregressive" and recorded["scheduling"] != scheduling_digest():
        pytest.skip("SKIPPED: the scheduler has changed since these runs: python -m analysis.fidelity --anew")
    scenario = build_scenario(yaml.safe_load(recorded["profile"]))
    assert isinstance(scenario.acceptance, TraceAcceptance)
    prediction = predict(scenario, scenario.acceptance.recorded)
    for metric in ("tokens_per_second", "ttft_s"):
        then = recorded["metrics"][metric]
        figure = make_figure(
            [flat_metrics(one)[metric] for one in (prediction.trace, *prediction.others)], then["spread"]
        )
        assert figure.predicted is not None
        error = figure.predicted / then["measured"] - 1
        assert abs(error) <= abs(then["error"]) + MARGIN, f"{metric}: {then['error']:+.1%} then, {error:+.1%} now"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("large"), **LARGE)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["autoregressive", "speculative", "pipeinfer"])
def test_predictions_of_live_runs_are_near(policy: str, large: Path, tmp_path: Path) -> None:
    scenario = build_scenario(
        {
            "model": {"name": str(large), "layers": LAYERS, "hidden": LARGE["hidden_size"], "vocabulary": 160},
            "cluster": {
                "stages": [{"repeat": 2, "cost": {"kind": "linear", "constant_ms": 1}}],
                "drafter": {"level_ms": 0.1},
            },
            "workload": {"prompt": " ".join(f"w{3 + i % 7}" for i in range(30)), "max_new_tokens": 48},
            "policy": {"name": policy},
            "acceptance": {"kind": "iid", "rate": 0.8},
            "execution": {"drafter": "planted"},
        }
    )
    others = OthersAtWork()
    measured = find_executor().measure(scenario, 5, 10, tmp_path)
    share = others.share()
    assert [replay(log) for log in tmp_path.iterdir()] == [None] * 5, "decisions are the same again (I9)"
    prediction = predict(calibrated(scenario, measured.observed), measured.observed.acceptance)
    figure = compare(prediction, measured.runs, measured.observed.acceptance.tokens)["tokens_per_second"]
    assert figure.error is not None
    assert figure.spread
    assert figure.measured
    spread = spread_share(figure.spread, figure.measured)
    told = (
        f"{policy}: error {figure.error:+.1%}, runs spread by {spread:.1%}, others used {share:.0%} of the processors"
    )
    print(told)
    if spread > NOISY or share > OTHERS:
        pytest.skip(f"SKIPPED: this machine is too busy for this test to say anything: {told}")
    assert abs(figure.error) <= LIVE_MARGIN + spread, told


class OthersAtWork:
    """How much of this machine's processors was used by others since this was made."""

    def __init__(self) -> None:
        self._since = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all processors, of them at work, and of them at work for this process and its children."""
        times = psutil.cpu_times()
        own = os.times()
        everything = sum(times[:8])  # guest time is in user time already
        return everything, everything - times.idle - times.iowait, sum(own[:4])

    def share(self) -> float:
        """The share since then, from 0 to 1. Children that have not ended yet count as others."""
        everything, working, own = (now - then for now, then in zip(self._now(), self._since, strict=True))
        return max(0.0, working - own) / everything
