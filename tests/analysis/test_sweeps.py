import math
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

from analysis.sweep_figure import _legend_columns, _looks, plot_sweep
from analysis.sweeps import Crossing, Layout, crossings, quantity, sentences, summary
from pipesim.statistics import Interval
from pipesim.sweep import Axis, cross

POLICIES = Axis("policy.name", ("speculative", "pipeinfer"))
BANDWIDTH = Axis("cluster.links.bandwidth_gbps", (0.01, 0.1, 1.0), log=True)
LATENCY = Axis("cluster.links.latency_ms", (1, 50))
SEEDS = 6


def frame_of(*axes: Axis, noise: float = 0.1, seeds: int = SEEDS) -> pd.DataFrame:
    """Speculative: 5 everywhere; pipeinfer: 5 + log10(bandwidth / 0.03); a seed shifts both alike."""
    shifts = np.random.default_rng(1).normal(0, 2, seeds)
    own = np.random.default_rng(2).normal(0, noise, seeds)
    rows = []
    for point in cross(axes):
        for seed in range(seeds):
            gain = math.log10(point["cluster.links.bandwidth_gbps"] / 0.03) + own[seed]
            speed = 5 + shifts[seed] + (gain if point["policy.name"] == "pipeinfer" else 0)
            rows.append({**point, "seed": seed, "tokens_per_second": speed, "error": None})
    return pd.DataFrame(rows)


def found(frame: pd.DataFrame, *axes: Axis, seeds: int = SEEDS) -> list[Crossing]:
    layout = Layout.of(axes, seeds, "tokens_per_second")
    return list(crossings(layout, layout.series(frame)))


def test_a_crossing_is_interpolated_on_the_scale_of_the_axis() -> None:
    (one,) = found(frame_of(POLICIES, BANDWIDTH, noise=1e-9), POLICIES, BANDWIDTH)
    assert one.at.estimate == pytest.approx(0.03)
    assert (one.lower, one.upper, one.under) == ("pipeinfer", "speculative", True)
    assert one.at.low == pytest.approx(one.at.high)


def test_seeds_shift_lines_far_more_than_crossings() -> None:
    (one,) = found(frame_of(POLICIES, BANDWIDTH), POLICIES, BANDWIDTH)
    assert one.at.low < 0.03 < one.at.high
    assert one.at.high / one.at.low < 2, "differences are paired: what a seed does to both lines is no doubt"


def test_lines_that_differ_no_more_than_by_chance_do_not_cross() -> None:
    assert not found(frame_of(POLICIES, BANDWIDTH, noise=20), POLICIES, BANDWIDTH)


def test_the_order_of_values_and_policies_does_not_matter() -> None:
    turned = Axis(BANDWIDTH.key, BANDWIDTH.values[::-1], log=True), Axis(POLICIES.key, POLICIES.values[::-1])
    (one,) = found(frame_of(POLICIES, BANDWIDTH), POLICIES, BANDWIDTH)
    (other,) = found(frame_of(*turned), *turned)
    assert other.at == one.at
    assert (other.lower, other.upper, other.under) == ("speculative", "pipeinfer", False)


def test_one_seed_has_a_crossing_without_interval() -> None:
    axes = POLICIES, BANDWIDTH
    layout = Layout.of(axes, 1, "tokens_per_second")
    crossed = list(crossings(layout, layout.series(frame_of(*axes, noise=1e-9, seeds=1))))
    assert sentences(layout, crossed) == ["pipeinfer falls below speculative under 30 Mbit/s"]


def test_failed_points_are_left_out_of_a_crossing() -> None:
    frame = frame_of(POLICIES, BANDWIDTH, noise=1e-9)
    frame.loc[frame["cluster.links.bandwidth_gbps"] == 0.1, "tokens_per_second"] = math.nan
    (one,) = found(frame, POLICIES, BANDWIDTH)
    assert one.at.estimate == pytest.approx(0.03), "the line is straight"


@pytest.mark.parametrize("seeds", [2, 4, 5])
def test_brackets_are_promised_only_where_seeds_are_enough_for_them(tmp_path: Path, seeds: int) -> None:
    (tmp_path / "s.yaml").write_text("# Why?\n")
    axes = POLICIES, BANDWIDTH
    text = summary(frame_of(*axes, noise=1e-9, seeds=seeds), Layout.of(axes, seeds, "tokens_per_second"),
                   tmp_path / "s.yaml", "cmd", None)  # fmt: skip
    assert ("under 30 [30, 30] Mbit/s" in text) == ("The brackets are" in text) == (seeds >= 5)
    assert "under 30" in text


def test_a_mean_of_fewer_seeds_than_the_page_says_tells_how_many(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("# Why?\n")
    axes = POLICIES, BANDWIDTH
    frame = frame_of(*axes)
    frame["tokens_per_second"] = 4.0
    frame.loc[[0, 1], "tokens_per_second"] = math.nan
    text = summary(frame, Layout.of(axes, SEEDS, "tokens_per_second"), tmp_path / "s.yaml", "cmd", None)
    assert "| 10 | 4 ± 0 (4 of 6) | 4 ± 0 |" in text


def test_sentences_name_place_policies_side_and_interval() -> None:
    axes = POLICIES, BANDWIDTH, LATENCY
    layout = Layout.of(axes, SEEDS, "tokens_per_second")
    one = Crossing("link latency 50 ms", "pipeinfer", "speculative", True, Interval(0.023, 0.019, 0.028), 4.0)
    assert sentences(layout, [one]) == [
        "link latency 50 ms: pipeinfer falls below speculative under 23 [19, 28] Mbit/s"
    ]
    assert len(sentences(layout, found(frame_of(*axes), *axes))) == 2


def test_the_first_numbers_are_the_axis_policies_the_lines_the_next_key_the_panels() -> None:
    layout = Layout.of([LATENCY, POLICIES, BANDWIDTH, Axis("seed", (1, 2))], 1, "ttft_s")
    assert (layout.x, layout.line, layout.panel, layout.rest) == (LATENCY, POLICIES, BANDWIDTH, ())
    assert layout.panels == ["link bandwidth 10 Mbit/s", "link bandwidth 100 Mbit/s", "link bandwidth 1000 Mbit/s"]
    plain = Layout.of([BANDWIDTH, LATENCY], 1, "ttft_s")
    assert (plain.x, plain.line, plain.lines) == (BANDWIDTH, LATENCY, ["link latency 1 ms", "link latency 50 ms"])


def test_settings_are_told_only_where_the_policy_does_not_tell() -> None:
    axis = Axis("policy", ({"name": "pipeinfer", "micro_batch": 2}, {"name": "speculative", "max_nodes": 6}))
    assert Layout.of([axis], 1, "ttft_s").lines == ["pipeinfer", "speculative"]
    axis = Axis("policy", ({"name": "pipeinfer", "micro_batch": 2}, {"name": "pipeinfer", "micro_batch": 4}))
    assert Layout.of([axis], 1, "ttft_s").lines == ["pipeinfer, micro_batch 2", "pipeinfer, micro_batch 4"]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("tokens_per_second", "speed (tokens/s)"),
        ("ttft_s", "time to first token (s)"),
        ("itl_s.p95", "gap between tokens p95 (s)"),
        ("link_bytes", "link (bytes)"),
        ("cluster.links.latency_ms", "link latency (ms)"),
        ("cluster.links.bandwidth_gbps", "link bandwidth (Gbit/s)"),
        ("cluster.links.hops.1.latency_ms", "hop 1 latency (ms)"),
        ("acceptance.rate", "acceptance rate"),
        ("policy.micro_batch", "micro batch"),
    ],
)
def test_axes_have_names_and_units(path: str, label: str) -> None:
    assert quantity(path).label == label


def test_seeds_that_are_varied_are_repeats() -> None:
    axes = Axis("seed", tuple(range(SEEDS))), POLICIES, BANDWIDTH
    repeated = frame_of(POLICIES, BANDWIDTH)
    order = repeated.sort_values("seed", kind="stable").reset_index(drop=True)
    layout = Layout.of(axes, 1, "tokens_per_second")
    assert list(crossings(layout, layout.series(order))) == found(repeated, POLICIES, BANDWIDTH)


def test_the_figure_has_lines_bands_crossings_and_units(tmp_path: Path) -> None:
    axes = POLICIES, BANDWIDTH, LATENCY
    layout = Layout.of(axes, SEEDS, "tokens_per_second")
    path = tmp_path / "f.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text as text
        plot_sweep(frame_of(*axes), layout, path)
    drawn = path.read_text()
    texts = [
        "speed (tokens/s)", "link bandwidth (Mbit/s)", "speculative", "pipeinfer", "link latency 50 ms",
        "link latency 1 ms: pipeinfer falls below speculative under", "bands: 95 % confidence over 6 seeds",
        "crossing, with its 95 % interval",
    ]  # fmt: skip
    for text in texts:
        assert text in drawn, text
    assert drawn.count("FillBetweenPolyCollection") == 4


def test_a_figure_is_drawn_where_points_failed(tmp_path: Path) -> None:
    axes = POLICIES, BANDWIDTH
    frame = frame_of(*axes)
    frame.loc[: SEEDS * 2, "tokens_per_second"] = math.nan
    plot_sweep(frame, Layout.of(axes, SEEDS, "tokens_per_second"), tmp_path / "f.png")


def test_lines_have_looks_of_their_own() -> None:
    looks = _looks(["autoregressive", "speculative", "pipeinfer", "mine", "yours"])
    assert len(set(looks.values())) == len({colour for colour, _ in looks.values()}) == 5


def test_a_legend_is_no_wider_than_its_figure() -> None:
    assert _legend_columns(["autoregressive", "speculative", "pipeinfer"], 7.8) == 3
    assert _legend_columns(["pipeinfer, micro_batch 1, p_accept 0.6"] * 4, 7.8) == 2
    assert _legend_columns(["x" * 200], 5.5) == 1


def test_the_summary_has_a_row_per_place_and_means_with_intervals(tmp_path: Path) -> None:
    scenario = tmp_path / "my-links.yaml"
    scenario.write_text("# Which one?\nmodel: {}\n# not this\n")
    frame = frame_of(POLICIES, BANDWIDTH, LATENCY)
    frame["tokens_per_second"] = 4.0
    text = summary(frame, Layout.of((POLICIES, BANDWIDTH, LATENCY), SEEDS, "tokens_per_second"), scenario, "cmd", None)
    assert text.startswith("# My links\n\nWhich one?\n\nNo two lines cross beyond chance.\n\n")
    assert "| where | link bandwidth (Mbit/s) | speculative | pipeinfer |\n|---|---:|---:|---:|\n" in text
    assert "| link latency 50 ms | 100 | 4 ± 0 | 4 ± 0 |" in text
    assert text.endswith("Made by\n\n    cmd\n")
