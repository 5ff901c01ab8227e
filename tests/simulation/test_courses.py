"""Quantities over time against integrals that do not know how they are computed."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipesim.errors import BadInputError
from pipesim.scenario import Link, LinkPlan, Profile, ProfilePoint
from pipesim.simulation.courses import (
    Course,
    Piece,
    at_best,
    bandwidth_course,
    latency_course,
    overlay,
    transfer_end,
    work_end,
)

MS = 1_000_000


def profile(*points: tuple[float, float], **settings: object) -> Profile:
    """A profile of bandwidths in Gbit/s at times in milliseconds."""
    given = tuple(ProfilePoint(at_ms=at, bandwidth_gbps=gbps) for at, gbps in points)
    return Profile.model_validate({"points": given, **settings})


def plan(latency_ms: float, gbps: float | None, course: Profile) -> LinkPlan:
    return LinkPlan("l", "data", Link(latency_ms=latency_ms, bandwidth_gbps=gbps, profile=course), None, None)


def latency(own_ms: float, course: Profile) -> Course:
    return latency_course(plan(own_ms, None, course))


def bandwidth(own_gbps: float | None, course: Profile) -> Course:
    return bandwidth_course(plan(0, own_gbps, course))


def test_before_the_first_point_the_own_value_holds_and_after_the_last_one_the_last() -> None:
    for shape in ("steps", "ramps"):
        course = bandwidth(5, profile((10, 1), (20, 3), shape=shape))
        assert [course.at(ms * MS) for ms in (0, 9.999999, 10, 20, 10**6)] == [5, 5, 1, 3, 3]


def test_steps_hold_and_ramps_go_straight() -> None:
    assert bandwidth(5, profile((10, 1), (20, 3))).at(15 * MS) == 1
    assert bandwidth(5, profile((10, 1), (20, 3), shape="ramps")).at(15 * MS) == 2


def test_a_periodic_course_repeats_and_its_ramps_lead_back() -> None:
    steps = bandwidth(5, profile((0, 1), (10, 3), period_ms=20))
    ramps = bandwidth(5, profile((0, 1), (10, 3), period_ms=20, shape="ramps"))
    for period in (0, 1, 7):
        base = period * 20 * MS
        assert [steps.at(base + ms * MS) for ms in (0, 9, 10, 19)] == [1, 1, 3, 3]
        assert [ramps.at(base + ms * MS) for ms in (0, 5, 10, 15)] == [1, 2, 3, 2]


def test_latency_and_bandwidth_take_their_own_points() -> None:
    both = Profile(points=(ProfilePoint(at_ms=1, latency_ms=7), ProfilePoint(at_ms=2, bandwidth_gbps=9)))
    assert latency(1, both).at(2 * MS) == 7 * MS
    assert bandwidth(None, both).at(1 * MS) == math.inf
    assert bandwidth(None, both).at(2 * MS) == 9


def test_at_its_best_a_link_has_its_lowest_latency_and_highest_bandwidth_of_all_times() -> None:
    points = [{"at_ms": 0, "bandwidth_gbps": 4}, {"at_ms": 5, "bandwidth_gbps": 3, "latency_ms": 2}]
    course = Profile.model_validate({"points": points})
    assert at_best(plan(1, 9, course)) == Link(latency_ms=1, bandwidth_gbps=4), "9 never holds, 1 at first"
    assert at_best(plan(3, None, Profile.model_validate({"points": points[1:]}))) == Link(latency_ms=2)


def test_a_ramp_carries_its_area() -> None:
    """1 to 3 Gbit/s in 10 ms: 20 Mbit. 2.5 MB that begin with the ramp end with it."""
    course = bandwidth(1, profile((0, 1), (10, 3), shape="ramps"))
    assert transfer_end(0, 2_500_000, course.piece) == 10 * MS
    assert transfer_end(0, 2_500_000 + 375_000, course.piece) == 11 * MS, "then 3 Gbit/s go on"
    down = bandwidth(1, profile((0, 3), (10, 1), shape="ramps"))
    assert transfer_end(0, 2_500_000, down.piece) == 10 * MS
    assert transfer_end(0, 1_375_000, down.piece) == round((3 - math.sqrt(9 - 4.4)) / 0.2 * MS), "3 t - t^2 / 10 = 11"


def test_many_periods_carry_their_mean() -> None:
    """2 Gbit/s on average, whatever the phase of whole periods."""
    for shape in ("steps", "ramps"):
        course = bandwidth(1, profile((0, 1), (10, 3), period_ms=20, shape=shape))
        for begin in (0, 3 * MS, 13 * MS):
            assert transfer_end(begin, 50 * 5_000_000, course.piece) == begin + 50 * 20 * MS


def test_a_pause_is_a_pause() -> None:
    course = overlay([(5 * MS, 9 * MS, 0.0)], lambda active: min(active, default=1.0))
    assert course is not None
    assert transfer_end(4 * MS, 250_000, course.piece) == 10 * MS, "1 ms before, 1 ms after"
    assert transfer_end(6 * MS, 0, course.piece) == 9 * MS, "not even nothing goes during it"


courses = st.builds(
    lambda gaps, values, ramps, periodic: Course(
        2.0,
        [sum(gaps[:i]) for i in range(len(values))],
        values,
        ramps,
        sum(gaps[: len(values)]) if periodic else None,
    ),
    st.lists(st.integers(10**4, 10**6), min_size=6, max_size=6),
    st.lists(st.floats(0.01, 50), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)


@given(courses, st.integers(0, 10**7), st.integers(0, 10**6))
def test_what_is_through_by_the_end_is_the_integral(course: Course, start: int, size_bytes: int) -> None:
    """Trapezes between the course's own breaks, summed without knowing where the transfer ends."""
    end, carried, now = transfer_end(start, size_bytes, course.piece), 0.0, start
    while now < end:
        value, slope, until = course.piece(now)
        until = min(until, end)
        carried += (2 * value + slope * (until - now)) / 2 * (until - now) / 8
        now = int(until)
    assert carried == pytest.approx(size_bytes, abs=50 / 8 + 1e-6 * size_bytes), "within what half a nanosecond carries"


@given(courses, st.integers(0, 10**7), st.integers(0, 10**5), st.integers(0, 10**5))
def test_two_transfers_in_a_row_end_as_one(course: Course, start: int, one: int, other: int) -> None:
    middle = transfer_end(start, one, course.piece)
    together = transfer_end(start, one + other, course.piece)
    assert transfer_end(middle, other, course.piece) == pytest.approx(together, abs=1 + 50 / 0.01)
    assert start <= middle <= together


def test_a_constant_course_costs_what_a_constant_costs() -> None:
    for gbps in (0.3, 1.0, 9.41):
        for size in (1, 77, 12345):
            assert transfer_end(11, size, lambda _, gbps=gbps: Piece(gbps, 0.0, math.inf)) == 11 + round(
                size * (8.0 / gbps)
            )


effects = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 30), st.floats(0.1, 9)).map(lambda e: (e[0], e[0] + e[1], e[2])),
    max_size=8,
)


@given(effects, st.permutations(range(8)))
def test_an_overlay_is_recomputed_at_every_moment_from_what_is_active(
    given_effects: list[tuple[int, int, float]], order: list[int]
) -> None:
    shuffled = [given_effects[i] for i in order if i < len(given_effects)]
    for combine in (sum, math.prod, lambda active: min(active, default=math.inf)):
        course = overlay(given_effects, combine)
        again = overlay(shuffled, combine)
        assert (course is None) == (not given_effects)
        for time in range(90) if course and again else ():
            active = sorted(strength for start, end, strength in given_effects if start <= time < end)
            assert course.at(time) == again.at(time) == combine(active)


def test_work_takes_longer_while_things_are_slow() -> None:
    pace = overlay([(10, 20, 2.0), (15, 30, 3.0)], math.prod)
    assert pace is not None
    assert work_end(0, 10, pace) == 10
    assert work_end(0, 12, pace) == 14
    assert work_end(0, 13, pace) == 18, "10 at full speed, 2.5 at half, half a one at a sixth"
    assert work_end(30, 7, pace) == 37


def write(path: Path, text: str) -> Profile:
    path.write_text(text)
    return Profile(file=path)


def test_a_file_says_the_same_as_points(tmp_path: Path) -> None:
    course = write(tmp_path / "t.csv", "at_ms, latency_ms, bandwidth_gbps\n0,1,\n10,,2.5\n20,3,4\n")
    assert [latency(9, course).at(ms * MS) / MS for ms in (0, 10, 20)] == [1, 1, 3]
    assert [bandwidth(9, course).at(ms * MS) for ms in (0, 10, 20)] == [9, 2.5, 4]
    alone = write(tmp_path / "u.csv", "bandwidth_gbps,at_ms\n7,5\n")
    assert bandwidth(9, alone).at(5 * MS) == 7


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has the columns none"),
        ("time,latency_ms\n1,2\n", "has the columns time, latency_ms"),
        ("at_ms\n1\n", "has the columns at_ms: at_ms and"),
        ("at_ms,latency_ms\n", "there is no point in it"),
        ("at_ms,latency_ms\n1,2\n1,3\n", "at_ms = 1.0 stands behind 1.0"),
        ("at_ms,latency_ms\n1,2\n2,fast\n", "line 3: .* no number"),
        ("at_ms,latency_ms\n1,-2\n", "line 2: .* within its bounds"),
        ("at_ms,bandwidth_gbps\n1,0\n", "line 2: .* within its bounds"),
        ("at_ms,bandwidth_gbps\n1,nan\n", "line 2: .* within its bounds"),
        ("at_ms,bandwidth_gbps\n1,2,3\n", "line 2: .* too many"),
        ("at_ms,bandwidth_gbps\n,2\n", "line 2"),
        ('at_ms,bandwidth_gbps\n1,"2\n', "cannot be read as CSV"),
    ],
)
def test_a_file_that_is_no_course_is_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(BadInputError, match=complaint) as caught:
        latency(1, write(path, text))
    assert str(caught.value).startswith(f"the profile of the link 'l': {path}")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"the profile of the link 'l': .*none\.csv cannot be read"):
        latency(1, Profile(file=tmp_path / "none.csv"))


def test_a_file_that_changes_is_read_again_and_one_that_does_not_is_not(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    first = latency(1, write(path, "at_ms,latency_ms\n0,2\n"))
    assert latency(1, Profile(file=path)) is first
    assert latency(1, write(path, "at_ms,latency_ms\n0,33\n")).at(0) == 33 * MS
