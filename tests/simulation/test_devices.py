import pytest

from pipesim.simulation.devices import Clock, Device


def test_equal_times_keep_the_order_in_which_they_were_asked_for() -> None:
    clock, seen = Clock(), []
    for name in "abc":
        clock.at(5, lambda call: seen.append((call.value, clock.now)), name)
    clock.at(3, lambda call: seen.append((call.value, clock.now)), "first")
    clock.run_calls()
    assert seen == [("first", 3), ("a", 5), ("b", 5), ("c", 5)]


def test_simpy_itself_can_carry_out_the_calls() -> None:
    clock, seen = Clock(), []
    for time in (7, 5, 7):
        clock.at(time, lambda call: seen.append((call.value, clock.now)), time)
    clock.timeout(6).callbacks.append(lambda _: seen.append((6, clock.now)))
    clock.run()
    assert seen == [(5, 5), (6, 6), (7, 7), (7, 7)]


def test_a_stopped_clock_leaves_the_rest_undone() -> None:
    clock, seen = Clock(), []
    clock.at(1, lambda _: setattr(clock, "stopped", True))
    clock.at(2, lambda _: seen.append(2))
    assert clock.run_calls() == 0
    assert not seen


def test_the_past_cannot_be_scheduled() -> None:
    clock = Clock()
    clock.at(5, lambda _: clock.at(4, lambda _: None))
    with pytest.raises(ValueError, match="Negative"):
        clock.run_calls()


def test_a_device_serves_as_many_as_it_has_cores_then_in_order_of_asking() -> None:
    device, begun = Device("d", 2), []
    for name in "abcd":
        device.acquire(lambda name=name: begun.append(name))
    assert begun == ["a", "b"]
    device.release()
    assert begun == ["a", "b", "c"]
    device.release()
    device.release()
    assert begun == ["a", "b", "c", "d"]
    device.release()
    device.release()
    device.acquire(lambda: begun.append("e"))
    assert begun[-1] == "e"
