"""The page on predictions: what is measured again, and that the page owns up to it."""

from typing import Any

import pytest

from analysis import fidelity


def attempt(spread: float, error: float) -> dict[str, Any]:
    """What one comparison found, of runs around 100 tokens/s."""
    speed = {
        "predicted": 100 * (1 + error),
        "interval": [90, 110],
        "measured": 100.0,
        "spread": [100 - 100 * spread / 2, 100 + 100 * spread / 2],
        "error": error,
        "verdict": "agrees",
    }
    return {
        "metrics": dict.fromkeys(("tokens_per_second", "ttft_s", "itl_s.p50", "itl_s.p95"), speed),
        "repeats": 3,
        "replays_identical": 3,
        "calibration": {"date": "2026-01-01T00:00:00", "rounds": 4},
    }


@pytest.mark.parametrize(
    ("attempts", "kept", "left_out"),
    [
        ([(0.1, 0.5)], 0.5, []),
        ([(0.3, 0.0), (0.1, 0.5)], 0.5, [0.0]),
        ([(0.3, 0.01), (0.4, 0.02), (0.5, 0.03), (0.1, 0.0)], 0.03, [0.01, 0.02]),
    ],
)
def test_runs_that_spread_are_measured_again_whatever_their_error(
    attempts: list[tuple[float, float]], kept: float, left_out: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([attempt(*one) for one in attempts])
    monkeypatch.setattr(fidelity, "compare", lambda *_: next(found))
    result = fidelity.measure([], 3, 4, 3)
    assert result["metrics"]["tokens_per_second"]["error"] == kept
    assert [one["error"] for one in result["left_out"]] == left_out
    text = " ".join(fidelity.page({"2 pipeinfer ngram": result}, "x.png", 3, [[attempt(0.2, -0.12)]]).split())
    assert "| 2026-01-01 00:00 | 0 of 1 | 12.0% | 12.0% | 20% |" in text, "another measurement"
    for error in left_out:
        assert f"{error:+.1%} (runs spread by" in text, "what was left out is shown"
    assert ("That was not necessary." in text) is (not left_out)
    assert ("too noisy to say anything" in text) is (len(left_out) == 2)
    assert f"within 10% in {int(kept <= 0.1)} of 1 settings" in text
