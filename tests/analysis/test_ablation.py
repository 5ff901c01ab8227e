from scenario_builder import build

from analysis.ablation import ablate, table


def test_the_ablation_has_a_row_for_every_mechanism_and_baseline() -> None:
    rows = ablate(build("workload.max_new_tokens=12"), seeds=[1, 2])
    names = [row.name.split(" (")[0] for row in rows]
    assert names == [
        "pipeinfer",
        "without cancellation",
        "without continuous speculation",
        "without asynchronous speculation",
        "without multibuffering",
        "with redundant canonical runs",
        "speculative",
        "autoregressive",
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "| 1.000 ± 0.000 |" in lines[2], "speeds are relative to the first row"
    assert len({line.count("|") for line in lines}) == 1
