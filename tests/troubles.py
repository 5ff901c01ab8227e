"""Hypothesis strategies for networks that vary and things that go wrong."""

from typing import Any

from hypothesis import strategies as st

COURSE = {
    "points": [
        {"at_ms": 0, "latency_ms": 1, "bandwidth_gbps": 1},
        {"at_ms": 50, "latency_ms": 9, "bandwidth_gbps": 1e-3},
    ]
}
chance = st.fixed_dictionaries(
    {},
    optional={
        "jitter_ms": st.sampled_from([0.1, 5]),
        "loss": st.sampled_from([0.001, 0.3]),
        "retransmit_ms": st.sampled_from([0, 1, 30]),
        "mtu_bytes": st.sampled_from([64, 1500]),
        "profile": st.fixed_dictionaries(
            {
                "points": st.just(COURSE["points"]),
                "period_ms": st.sampled_from([None, 51, 90]),
                "shape": st.sampled_from(["steps", "ramps"]),
            }
        ),
    },
)
"""What a link may have beside latency and bandwidth."""


def faults(stages: int, until_ms: int) -> st.SearchStrategy[dict[str, Any]]:
    """One fault of any kind, in a pipeline of so many stages, that begins by ``until_ms``."""
    start_ms = st.integers(0, until_ms)
    span = {"duration_ms": st.integers(1, 800)}
    named = st.sampled_from([f"stage {stages - 1} to head", f"head to stage {stages - 1} (control)", "head to drafter"])
    on_link = {**span, "link": st.sampled_from(["all", "data", "control", "draft"]) | st.integers(0, stages) | named}
    stage, pause_ms = st.integers(0, stages - 1), st.integers(0, 300)

    def some(kind: str, **fields: Any) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({"kind": st.just(kind), "start_ms": start_ms, **fields})

    return st.one_of(
        some("latency", **on_link, extra_ms=st.integers(1, 200)),
        some("bandwidth", **on_link, cap_gbps=st.sampled_from([0.00005, 0.001])),
        some("jitter", **on_link, extra_ms=st.integers(1, 50)),
        some("loss", **on_link, probability=st.sampled_from([0.01, 0.5, 0.999])),
        some("partition", **on_link),
        some("slow-stage", **span, stage=stage, factor=st.sampled_from([1.5, 20])),
        some("crash", stage=stage, detect_ms=pause_ms, restart_ms=pause_ms),
    )
