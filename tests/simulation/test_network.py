"""Links by themselves against closed forms: chance, faults, shared interfaces, queues."""

import itertools
import math
import random
import typing
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from passages import pass_over
from scenario_builder import PLAIN, build

from pipesim.scenario import Fault, Link, LinkFault, LinkPlan, OwnLink, Profile
from pipesim.scenario.faults import BandwidthFault, JitterFault, LatencyFault, LossFault, PartitionFault
from pipesim.scenario.network import PRESETS
from pipesim.scenario_file import load_scenario
from pipesim.simulation.courses import Course
from pipesim.simulation.devices import Clock
from pipesim.simulation.links import LinkModel
from pipesim.simulation.network import Network, VaryingLink, losses
from pipesim.simulation.pipeline import simulate

MS = 1_000_000
MANY = 20_000


def link(*faults: LinkFault, name: str = "l", seed: int = 1, **settings: Any) -> VaryingLink:
    return VaryingLink(LinkPlan(name, "data", Link(**settings), None, None), list(faults), seed)


def delays_ms(one: VaryingLink, count: int = MANY, size_bytes: int = 1000, gap_ms: float = 1e6) -> list[float]:
    """Of messages so far apart that none waits for another."""
    sent = [round(i * gap_ms * MS) for i in range(count)]
    return [(pass_over(one, now, size_bytes)[2] - now) / MS for now in sent]


messages = st.lists(st.tuples(st.integers(0, 3 * MS), st.integers(0, 10**6)), max_size=30)


@given(messages, st.floats(0, 9), st.sampled_from([None, 0.008, 0.941, 40.0]))
def test_without_anything_special_it_is_a_plain_link_to_the_nanosecond(
    sends: list[tuple[int, int]], latency_ms: float, gbps: float | None
) -> None:
    varying = link(latency_ms=latency_ms, bandwidth_gbps=gbps)
    plain = LinkModel("l", Link(latency_ms=latency_ms, bandwidth_gbps=gbps))
    now = 0
    for gap, size in sends:
        now += gap
        assert pass_over(varying, now, size) == pass_over(plain, now, size)


# -- chance ------------------------------------------------------------------------------------------------------------


def test_jitter_is_exponential_with_the_given_mean_and_cut_off_at_ten() -> None:
    """Of the mean, the cut takes e^-10."""
    found = [delay - 3 for delay in delays_ms(link(latency_ms=3, jitter_ms=2))]
    assert fmean(found) == pytest.approx(2, rel=4 / math.sqrt(MANY))
    for means in (0.5, 1, 2):
        share = fmean(delay > 2 * means for delay in found)
        assert share == pytest.approx(math.exp(-means), abs=4 * 0.5 / math.sqrt(MANY))
    assert 0 <= min(found) <= max(found) <= 20


@pytest.mark.parametrize(("loss", "size_bytes"), [(0.3, 1), (0.3, 1500), (0.05, 15_000), (0.01, 1_500_000)])
def test_a_message_is_late_by_the_losses_of_its_unluckiest_packet(loss: float, size_bytes: int) -> None:
    """Mean of the largest of n geometric counts: the sum over k of 1 - (1 - p^(k+1))^n; for one packet p / (1 - p)."""
    found = [delay / 40 for delay in delays_ms(link(loss=loss, retransmit_ms=40), size_bytes=size_bytes)]
    packets = max(1, -(-size_bytes // 1500))
    expected = sum(1 - (1 - loss ** (k + 1)) ** packets for k in range(200))
    assert fmean(found) == pytest.approx(expected, abs=4 * math.sqrt(1.5 / MANY))
    assert all(late == int(late) for late in found)


def test_the_number_of_losses_follows_its_distribution_exactly() -> None:
    """P(at most k) = (1 - p^(k+1))^n, read off at both sides of each step."""
    for packets in (1, 7):
        for k in range(6):
            bound = (1 - 0.3 ** (k + 1)) ** packets
            assert losses(bound * (1 - 1e-12), packets, Course(0.3), 0, 1) == k
            assert losses(bound * (1 + 1e-12), packets, Course(0.3), 0, 1) == k + 1


def test_each_repetition_is_lost_with_the_probability_of_its_moment() -> None:
    """Sent at 2 and every 4 later: at 2, 6 and 10 half are lost, then a tenth, from 20 on none."""
    course, product = Course(0.5, [11, 20], [0.1, 0.0]), 1.0
    for k, loss in enumerate([0.5, 0.5, 0.5, 0.1, 0.1]):
        product *= loss
        bound = (1 - product) ** 7
        assert losses(bound * (1 - 1e-12), 7, course, 2, 4) == k
        assert losses(bound * (1 + 1e-12), 7, course, 2, 4) == k + 1
    assert losses(1 - 1e-15, 7, course, 2, 4) == 5


def test_what_is_lost_in_a_fault_gets_through_when_it_is_over() -> None:
    """However certain the loss is: together these faults lose all but 10^-24 of the packets."""
    wrong = [LossFault(kind="loss", start_ms=0, duration_ms=10, probability=1 - 1e-12)] * 2
    assert delays_ms(link(*wrong, retransmit_ms=4), 1) == [12]
    assert delays_ms(link(*wrong, retransmit_ms=0), 1) == [0]


def test_chance_depends_on_seed_link_and_message_number_alone() -> None:
    assert delays_ms(link(jitter_ms=1), 50) == delays_ms(link(jitter_ms=1), 50, size_bytes=9, gap_ms=500)
    assert delays_ms(link(jitter_ms=1), 50) != delays_ms(link(jitter_ms=1, seed=2), 50)
    assert delays_ms(link(jitter_ms=1), 50) != delays_ms(link(jitter_ms=1, name="m"), 50)


# -- faults ------------------------------------------------------------------------------------------------------------

times = {"start_ms": st.floats(0, 40), "duration_ms": st.floats(0.001, 40)}
faults = st.one_of(
    st.builds(LatencyFault, kind=st.just("latency"), extra_ms=st.floats(0.001, 50), **times),
    st.builds(BandwidthFault, kind=st.just("bandwidth"), cap_gbps=st.floats(0.001, 2), **times),
    st.builds(JitterFault, kind=st.just("jitter"), extra_ms=st.floats(0.001, 50), **times),
    st.builds(LossFault, kind=st.just("loss"), probability=st.floats(0.001, 0.9), **times),
    st.builds(PartitionFault, kind=st.just("partition"), **times),
)


@given(st.lists(faults, max_size=6), st.permutations(range(6)), messages, st.floats(0, 5), st.floats(0, 0.5))
def test_messages_stay_in_order_whatever_goes_wrong_and_the_order_of_faults_is_irrelevant(
    wrong: list[LinkFault], order: list[int], sends: list[tuple[int, int]], jitter_ms: float, loss: float
) -> None:
    settings = {"latency_ms": 1, "bandwidth_gbps": 1, "jitter_ms": jitter_ms, "loss": loss, "retransmit_ms": 5}
    one, other = link(*wrong, **settings), link(*[wrong[i] for i in order if i < len(wrong)], **settings)
    partitions = [fault for fault in wrong if isinstance(fault, PartitionFault)]
    now = free_at = last = 0
    for gap, size in sends:
        now += gap
        start, end, arrival = pass_over(one, now, size)
        assert (start, end, arrival) == pass_over(other, now, size)
        assert max(now, free_at) <= start <= end <= arrival
        assert start == max(now, free_at) or any(start == ends_ns(fault) for fault in partitions)
        assert arrival >= last
        for fault in partitions:
            assert not fault.start_ms * MS + 1 <= arrival < (fault.start_ms + fault.duration_ms) * MS - 1
        free_at, last = end, arrival


def ends_ns(fault: LinkFault) -> int:
    return round((fault.start_ms + fault.duration_ms) * MS)


def test_a_fault_that_ends_leaves_exactly_the_base() -> None:
    wrong = [
        LatencyFault(kind="latency", start_ms=1, duration_ms=8, extra_ms=0.1),
        BandwidthFault(kind="bandwidth", start_ms=2, duration_ms=8, cap_gbps=0.0001),
        JitterFault(kind="jitter", start_ms=3, duration_ms=7, extra_ms=3),
        LossFault(kind="loss", start_ms=3, duration_ms=2, probability=0.9),
        PartitionFault(kind="partition", start_ms=4, duration_ms=1),
    ]
    settings = {"latency_ms": 0.3, "bandwidth_gbps": 0.941}
    broken, plain = link(*wrong, **settings), LinkModel("l", Link(**settings))
    assert pass_over(broken, 0, 999) == pass_over(plain, 0, 999)
    assert pass_over(broken, 5 * MS, 999) != pass_over(plain, 5 * MS, 999)
    for now in range(60 * MS, 70 * MS, 12345):
        assert pass_over(broken, now, now % 999) == pass_over(plain, now, now % 999)


def test_latency_faults_add_up_and_the_lowest_cap_counts() -> None:
    wrong = [
        LatencyFault(kind="latency", start_ms=0, duration_ms=50, extra_ms=2),
        LatencyFault(kind="latency", start_ms=20, duration_ms=50, extra_ms=5),
        BandwidthFault(kind="bandwidth", start_ms=0, duration_ms=50, cap_gbps=0.1),
        BandwidthFault(kind="bandwidth", start_ms=20, duration_ms=50, cap_gbps=0.05),
    ]
    one = link(*wrong, latency_ms=1, bandwidth_gbps=1)
    found = [pass_over(one, ms * MS, 12_500) for ms in (10, 30, 60, 80)]
    assert [end - start for start, end, _ in found] == [1 * MS, 2 * MS, 2 * MS, 0.1 * MS]
    assert [arrival - end for _, end, arrival in found] == [3 * MS, 8 * MS, 6 * MS, 1 * MS]


def test_a_cap_halves_a_message_that_it_meets_on_the_way() -> None:
    """1 ms of 2 ms at 1 Gbit/s, the other at 0.25."""
    cap = BandwidthFault(kind="bandwidth", start_ms=1, duration_ms=50, cap_gbps=0.25)
    assert pass_over(link(cap, bandwidth_gbps=1), 0, 250_000) == (0, 5 * MS, 5 * MS)


def test_a_cap_counts_where_it_is_below_a_ramp() -> None:
    """0 to 10 ms: 1 to 3 Gbit/s, capped at 2: 1.5 for 5 ms, then 2."""
    ramp = {"points": [{"at_ms": 0, "bandwidth_gbps": 1}, {"at_ms": 10, "bandwidth_gbps": 3}], "shape": "ramps"}
    scenario = build(f"cluster.links={{profile: {ramp}}}")
    cap = BandwidthFault(kind="bandwidth", start_ms=0, duration_ms=50, cap_gbps=2)
    one = VaryingLink(scenario.links()[0], [cap], 1)
    assert pass_over(one, 0, (7_500_000 + 2_000_000) // 8)[1] == pytest.approx(6 * MS, abs=2)
    down = {"points": [{"at_ms": 0, "bandwidth_gbps": 3}, {"at_ms": 10, "bandwidth_gbps": 1}], "shape": "ramps"}
    one = VaryingLink(build(f"cluster.links={{profile: {down}}}").links()[0], [cap], 1)
    assert pass_over(one, 0, (10_000_000 + 1_900_000) // 8)[1] == pytest.approx(6 * MS, abs=2)


def test_jitter_bursts_add_to_the_mean_and_losses_are_independent() -> None:
    far = {"start_ms": 0, "duration_ms": 1e12}
    bursts = [JitterFault(kind="jitter", extra_ms=extra, **far) for extra in (1, 2)]
    assert fmean(delays_ms(link(*bursts, jitter_ms=1))) == pytest.approx(4, rel=4 / math.sqrt(MANY))
    lossy = [LossFault(kind="loss", probability=p, **far) for p in (0.2, 0.5)]
    lost = fmean(delay > 0 for delay in delays_ms(link(*lossy, loss=0.1, retransmit_ms=7)))
    assert lost == pytest.approx(1 - 0.8 * 0.5 * 0.9, abs=4 * 0.5 / math.sqrt(MANY))


def test_what_a_partition_cuts_off_arrives_after_it_in_order() -> None:
    cut = PartitionFault(kind="partition", start_ms=10, duration_ms=20)
    one = link(cut, latency_ms=2, bandwidth_gbps=1)
    assert pass_over(one, round(8.9 * MS), 12_500)[2] == 32 * MS, "on its way when the link broke: sent again"
    assert pass_over(one, 15 * MS, 12_500) == (30 * MS, round(30.1 * MS), round(32.1 * MS)), "waits, is not sent"
    assert pass_over(one, 16 * MS, 12_500)[1:] == (round(30.2 * MS), round(32.2 * MS))
    assert pass_over(link(cut, latency_ms=2), round(7.9 * MS), 1)[2] == round(9.9 * MS)


def test_partitions_in_a_row_are_one_partition() -> None:
    row = [PartitionFault(kind="partition", start_ms=start, duration_ms=11) for start in (30, 10, 20)]
    assert pass_over(link(*row, latency_ms=2), 15 * MS, 1)[2] == 43 * MS
    assert pass_over(link(*row, latency_ms=2), 9 * MS, 1)[2] == 43 * MS


# -- shared interfaces -------------------------------------------------------------------------------------------------

GIGABIT = 125_000
"""Bytes that take a millisecond."""


def shared(*overrides: str) -> tuple[Network, Clock]:
    """Head and drafter on one device, three stages on another: 1 Gbit/s each, unlimited links of 5 ms."""
    clock = Clock()
    scenario = build(
        "cluster.devices=[{name: a, nic_gbps: 1}, {name: b, nic_gbps: 1}]",
        "cluster.head.device=a",
        "cluster.drafter.device=a",
        "cluster.stages.0.device=b",
        "cluster.links={latency_ms: 5}",
        *overrides,
    )
    return Network(scenario, clock), clock


def arrivals_ms(network: Network, clock: Clock, *sends: tuple[LinkModel, float, int]) -> list[float]:
    """When messages arrive, each given by its link, the time it is sent and its bytes."""
    found = [math.nan] * len(sends)

    def send(index: int, one: LinkModel, size: int) -> None:
        one.send(clock.now, size, lambda passage, _: found.__setitem__(index, passage[2] / MS), None)

    for index, (one, at_ms, size) in enumerate(sends):
        clock.at(round(at_ms * MS), lambda _, index=index, one=one, size=size: send(index, one, size))
    clock.run_calls()
    return found


def test_links_that_leave_a_device_share_its_interface() -> None:
    network, clock = shared()
    sends = [(network.data[0], 0, GIGABIT), (network.control[1], 0, GIGABIT), (network.control[2], 0.5, GIGABIT)]
    assert arrivals_ms(network, clock, *sends) == [6, 7, 8]


def test_a_message_alone_takes_what_the_slowest_part_of_its_way_needs() -> None:
    for gbps, expected in ((10, 6), (0.5, 7)):
        network, clock = shared(f"cluster.links.bandwidth_gbps={gbps}")
        assert arrivals_ms(network, clock, (network.data[0], 0, GIGABIT)) == [expected]


def test_links_on_one_device_do_not_pass_its_interface() -> None:
    network, clock = shared()
    sends = [(network.data[0], 0, GIGABIT), (network.data[1], 0, GIGABIT), (network.to_drafter, 0, GIGABIT)]
    assert arrivals_ms(network, clock, *sends) == [6, 5, 5]
    assert type(network.data[1]) is LinkModel


def test_both_directions_have_their_own_bandwidth() -> None:
    network, clock = shared()
    assert arrivals_ms(network, clock, (network.data[0], 0, GIGABIT), (network.data[3], 0, GIGABIT)) == [6, 6]


def test_what_enters_a_device_queues_in_order_of_arrival_not_of_sending() -> None:
    """Drafter and last stage have machines of their own. The drafter, near, sends later, and is there first."""
    network, clock = shared(
        "cluster.devices=[{name: a, nic_gbps: 1}]",
        "cluster.stages.0.device=null",
        "cluster.drafter.device=null",
        "cluster.links={latency_ms: 5, draft: {latency_ms: 1}}",
    )
    home, draft = network.data[3], network.from_drafter
    sends = [(home, 0, GIGABIT), (draft, 3.5, GIGABIT), (home, 1, GIGABIT)]
    assert arrivals_ms(network, clock, *sends) == [6.5, 5.5, 7.5]


@pytest.mark.parametrize("gbps", ["null", "1", "0.5"])
def test_what_several_links_held_back_enters_a_device_one_by_one(gbps: str) -> None:
    """Three messages are sent into a partition, or met by it half-way, and leave the links at the same time."""
    cut = "faults=[{kind: partition, start_ms: 1.5, duration_ms: 98.5}]"
    network, clock = shared(cut, "cluster.devices.0.nic_gbps=null", f"cluster.links.bandwidth_gbps={gbps}")
    sends = [(one, at_ms, GIGABIT) for one, at_ms in zip((network.data[0], *network.control), (1, 2, 3), strict=False)]
    found = arrivals_ms(network, clock, *sends)
    assert found == sorted(found)
    assert all(after - before >= 1 for before, after in itertools.pairwise(found))
    assert found[-1] - found[0] <= 3


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5 * MS), st.integers(0, 10**6)), max_size=25))
def test_messages_of_one_link_stay_in_order_through_a_shared_interface(sends: list[tuple[int, int, int]]) -> None:
    network, clock = shared("cluster.links={latency_ms: 1, jitter_ms: 3, bandwidth_gbps: 2}")
    links = [network.data[0], *network.control[:2]]
    now, sent = 0, []
    for which, gap, size in sends:
        now += gap
        sent.append((links[which], now / MS, size))
    found = arrivals_ms(network, clock, *sent)
    for one in links:
        mine = [arrival for arrival, (other, _, _) in zip(found, sent, strict=True) if other is one]
        assert mine == sorted(mine)
    carried, last = sum(size for *_, size in sent), max(found, default=0.0)
    assert last >= carried / GIGABIT, "no faster than the interface"


# -- queues ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("kind", ["plain", "varying"])
def test_random_arrivals_wait_as_long_as_the_m_d_1_queue_says(load: float, kind: str) -> None:
    """Mean wait of Poisson arrivals at a server of constant time 1: load / (2 (1 - load)) (Pollaczek-Khinchine)."""
    one = LinkModel("l", Link(bandwidth_gbps=1)) if kind == "plain" else link(bandwidth_gbps=1)
    chance, now, waits = random.Random(5), 0.0, []
    for _ in range(60_000):
        now += chance.expovariate(load) * MS
        waits.append((pass_over(one, round(now), GIGABIT)[0] - round(now)) / MS)
    assert fmean(waits) == pytest.approx(load / (2 * (1 - load)), rel=0.06)


def test_a_link_of_which_nothing_special_is_asked_is_a_plain_one() -> None:
    assert {type(one) for one in Network(build(), Clock())} == {LinkModel}
    assert {type(one) for one in Network(build("cluster.links.jitter_ms=1"), Clock())} == {VaryingLink}
    hop = Network(build("cluster.links.hops=[{hop: 1, loss: 0.1}]"), Clock())
    assert [type(one) for one in hop.data] == [LinkModel, VaryingLink, LinkModel, LinkModel]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("all", {"data", "control", "draft"}),
        ("data", {"data"}),
        ("control", {"control"}),
        ("draft", {"draft"}),
        ("2", {"stage 1 to stage 2"}),
        ("stage 1 to stage 2", {"stage 1 to stage 2"}),
        ("head to stage 0 (control)", {"head to stage 0 (control)"}),
        ("drafter to head", {"drafter to head"}),
    ],
)
def test_a_fault_hits_the_links_that_it_names(target: str, expected: set[str]) -> None:
    scenario = build(f"faults=[{{kind: latency, start_ms: 0, duration_ms: 9, extra_ms: 1, link: {target}}}]")
    hit = {
        plan.name
        for plan, one in zip(scenario.links(), Network(scenario, Clock()), strict=True)
        if isinstance(one, VaryingLink)
    }
    assert hit == {plan.name for plan in scenario.links() if {plan.name, plan.group} & expected}
    assert hit


# -- what the documentation says ---------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent.parent / "docs" / "network.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without backticks."""
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), PAGE.split(f"\n{heading}\n")[1].splitlines())
    rows = [line.strip("|").split("|") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return [[cell.strip().replace("`", "") for cell in row] for row in rows[2:]]


def test_the_page_has_every_key_and_default() -> None:
    links = table("## Links")
    assert {row[0] for row in links} == set(OwnLink.model_fields)
    plain = Link()
    for key, _, default in links:
        if default not in ("none", "no limit"):
            assert float(default) == getattr(plain, key)
    assert {row[0] for row in table("### Profiles")} == set(Profile.model_fields)
    faults = {row[0]: set(row[1].split(", ")) for row in table("## Faults")}
    for kind in typing.get_args(typing.get_args(Fault)[0]):
        fields = set(kind.model_fields) - {"kind", "start_ms", "duration_ms"}
        assert faults.pop(typing.get_args(kind.model_fields["kind"].annotation)[0]) == fields
    assert not faults


def test_the_page_has_every_preset() -> None:
    for name, *figures in table("### Presets"):
        preset = PRESETS[name]
        expected = (preset.latency_ms, preset.bandwidth_gbps, preset.jitter_ms, preset.loss)
        assert [float(figure) for figure in figures] == pytest.approx(expected, rel=1e-4)
    assert {row[0] for row in table("### Presets")} == set(PRESETS)


def test_the_example_on_the_page_simulates(tmp_path: Path) -> None:
    raw = {**PLAIN, **yaml.safe_load(PAGE.split("```yaml\n")[1].split("```")[0])}
    (tmp_path / "trace.csv").write_text("at_ms,latency_ms\n0,1\n500,9\n")
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(raw))
    assert simulate(load_scenario(tmp_path / "s.yaml")).complete
