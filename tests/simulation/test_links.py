from passages import pass_over

from pipesim.scenario import Link
from pipesim.scheduling.runs import Run, RunKind, SequenceRemove
from pipesim.simulation.links import LinkModel, metadata_bytes


def test_bandwidth_occupies_the_link_and_latency_does_not() -> None:
    link = LinkModel("l", Link(latency_ms=1, bandwidth_gbps=0.008))  # 1000 ns per byte
    assert pass_over(link, 0, 100) == (0, 100_000, 1_100_000)
    assert pass_over(link, 0, 100) == (100_000, 200_000, 1_200_000), "it waits for the first to be sent, not to arrive"
    assert pass_over(link, 5_000_000, 1) == (5_000_000, 5_001_000, 6_001_000)
    assert link.sent_bytes == 201


def test_unlimited_bandwidth_takes_no_time() -> None:
    assert pass_over(LinkModel("l", Link(latency_ms=2)), 7, 10**9) == (7, 7, 7 + 2_000_000)


def test_a_small_message_never_overtakes_a_large_one() -> None:
    link = LinkModel("l", Link(latency_ms=0.1, bandwidth_gbps=1))
    assert pass_over(link, 0, 10**6)[-1] <= pass_over(link, 1, 0)[-1]


def test_a_frame_grows_with_rows_and_kv_operations() -> None:
    def run(rows: int, operations: int) -> Run:
        removals = (SequenceRemove(1, 0, 1),) * operations
        ones = (1,) * rows
        return Run(0, 0, RunKind.SPECULATIVE, ones, ones, ones, kv_operations=removals)

    assert metadata_bytes(run(1, 0)) < metadata_bytes(run(2, 0)) < metadata_bytes(run(2, 1))
