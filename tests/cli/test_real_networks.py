"""Stages on machines of their own, as far as the network goes: its real bandwidth held against the simulator's, and
cables that are pulled.

Root only: each machine is a network namespace, and ``tc tbf`` slows its cable down. What is run there are a user's own
commands: stage servers, calibrate, compare, generate.
"""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import PROMPT, as_json, command
from machines import PAYLOAD_SHARE, Machines, machines
from talker import save_talker

from pipesim.comparison import NOISY

HIDDEN = 8192  # 32 KiB for each row: most of the time goes into the link
WIDE = {"hidden_size": HIDDEN, "head_dim": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
WIDE |= {"intermediate_size": 32}
MARGIN = 0.06
"""So far off may a prediction be, beside the measured runs' own spread: ``machines.py`` says what tbf really does."""


@dataclass(frozen=True)
class Site:
    """Machines behind a switch: the head's, two with a stage server each, and one without."""

    network: Machines
    hosts: tuple[str, str]

    def pipesim(self, *arguments: object) -> dict[str, Any]:
        """What a command on the head's machine prints."""
        asked = self.network.on("head", command(*arguments))
        return as_json(subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False))


@contextlib.contextmanager
def stage_on(network: Machines, name: str) -> Iterator[str]:
    """A stage server on that machine, and where it listens."""
    asked = network.on(name, command("stage", "--listen", f"{network.address(name)}:0"))
    server = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout
        yield json.loads(server.stdout.readline())["listening"]
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with (
        machines("head", "first", "second", "third") as network,
        stage_on(network, "first") as first,
        stage_on(network, "second") as second,
    ):
        yield Site(network, (first, second))


# -- bandwidth ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A pipeline of two wide stages, whose costs were measured while no cable had a limit."""

    site: Site
    scenario: Path
    profile: Path

    def compare(self, policy: str, *settings: str) -> dict[str, Any]:
        """The metrics of `pipesim compare`, which also sees to it that every text is plain decoding's."""
        asked = [f"calibration={self.profile}", f"policy.name={policy}", *settings]
        flags = [word for one in asked for word in ("--set", one)]
        metrics = self.site.pipesim("compare", self.scenario, "--repeats", 3, "--json", *flags)["metrics"]
        assert isinstance(metrics, dict)
        return metrics


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("wide") / "model", layers=2, **WIDE)


@pytest.fixture(scope="module")
def measured(site: Site, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("measured")
    scenario = {
        "model": {"name": str(wide), "layers": 2, "hidden": HIDDEN, "vocabulary": 160},
        "cluster": {
            "stages": [{"repeat": 2, "cost": {"kind": "linear", "constant_ms": 1}}],
            "drafter": {"level_ms": 0.1},
        },
        "workload": {"prompt": PROMPT[:60], "max_new_tokens": 16},
        "policy": {"name": "pipeinfer"},
        "acceptance": {"kind": "iid", "rate": 0.8},
        "execution": {"drafter": "planted", "hosts": list(site.hosts)},
    }
    found = Measured(site, folder / "scenario.yaml", folder / "profile.yaml")
    found.scenario.write_text(yaml.safe_dump(scenario))
    site.pipesim("calibrate", found.scenario, "--rounds", 4, "-o", found.profile, "--json")
    return found


@pytest.mark.parametrize("mbps", [10, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["autoregressive", "pipeinfer"])
def test_a_slow_cable_costs_what_the_simulator_says(measured: Measured, policy: str, mbps: int) -> None:
    """Nothing was fitted to these runs: of the cable the simulator knows the rate that tc was told."""
    network = measured.site.network
    network.limit("first", mbps)
    try:
        slow = measured.compare(policy, f"cluster.links.hops.1.bandwidth_gbps={1e-3 * mbps * PAYLOAD_SHARE:.6f}")
    finally:
        network.limit("first", None)
    fast = measured.compare(policy)  # under the same load of the machine: what is compared is what the cable adds
    for name in ("e2e_s", "ttft_s"):
        predicted, found = (slow[name][kind] - fast[name][kind] for kind in ("predicted", "measured"))
        spread = sum(one[name]["spread"][1] - one[name]["spread"][0] for one in (slow, fast)) / found
        told = (
            f"{mbps} Mbit/s, {policy}, {name}: {slow[name]['measured']:.4g} instead of {fast[name]['measured']:.4g}, "
        )
        told += f"{predicted:.4g} more predicted, error {predicted / found - 1:+.1%}, spread {spread:.1%}"
        print(told)
        if spread > NOISY:
            pytest.skip(f"SKIPPED: this machine is too busy to say anything: {told}")
        assert abs(predicted / found - 1) <= MARGIN + spread, told
        assert found > fast[name]["measured"], "the cable is what is slow"


@pytest.mark.parametrize("mbps", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_cable_that_needs_seconds_for_a_message_is_slow_and_not_broken(
    site: Site, wide: Path, mbps: int, tmp_path: Path
) -> None:
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(list(site.hosts)))
    asked = ("generate", PROMPT, "--raw", "--model", wide, "--max-new-tokens", 2)
    asked += ("--cluster", tmp_path / "hosts.yaml", "--policy", "autoregressive", "--json")
    fast = site.pipesim(*asked)
    site.network.limit("first", mbps)
    try:
        slow = site.pipesim(*asked, "--set", "execution.recovery.attempts=0")
    finally:
        site.network.limit("first", None)
    assert slow["text"] == fast["text"]
    assert slow["metrics"]["ttft_s"] > 3.5, "longer than any link is waited for"


# -- outages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talking:
    """A tiny model on the two stages; ``text`` is what it says if nothing happens."""

    network: Machines
    hosts: tuple[str, str]
    asked: tuple[object, ...]
    text: str

    @contextlib.contextmanager
    def generation(self, *settings: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A generation of which the first byte was read, and that goes on for a while."""
        flags = [word for one in settings for word in ("--set", one)]
        asked = self.network.on("head", command(*self.asked, *flags))
        process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        try:
            assert process.stdout
            assert process.stdout.read(1) == b"w"
            yield process
        finally:
            process.kill()
            process.communicate()

    def end(self, process: "subprocess.Popen[bytes]") -> str:
        """Hears the whole text out, which is what it should be; returns what else was said."""
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert f"w{rest.decode()}" == f"{self.text}\n"
        return errors.decode()


@pytest.fixture(scope="module")
def talking(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Talking:
    folder = tmp_path_factory.mktemp("talking")
    (folder / "hosts.yaml").write_text(yaml.safe_dump(list(site.hosts)))
    asked = ("generate", PROMPT, "--raw", "--model", save_talker(folder / "model"), "--max-new-tokens", 400)
    asked += ("--cluster", folder / "hosts.yaml")
    text = site.pipesim(*asked, "--policy", "autoregressive", "--json")["text"]
    return Talking(site.network, site.hosts, asked, str(text))


def read_until(stream: Any, words: str) -> str:
    """The line that has ``words``."""
    for line in stream:
        if words.encode() in line:
            return str(line.decode())
    raise AssertionError(f"nobody said: {words}")


def test_a_cable_that_is_pulled_and_put_back_at_once_loses_nothing(talking: Talking) -> None:
    with talking.generation() as process:
        talking.network.plug("second", False)
        talking.network.plug("second", True)
        assert not talking.end(process), "no stage was lost"


@pytest.mark.parametrize("between", ["the head and a stage", pytest.param("two stages", marks=pytest.mark.slow)])
def test_when_a_cable_is_back_the_text_goes_on(talking: Talking, between: str) -> None:
    """It is put back as soon as the head has found out."""

    def connect(connected: bool) -> None:
        if between == "two stages":
            talking.network.part(["first", "second"], not connected)
        else:
            talking.network.plug("second", connected)

    with talking.generation() as process:
        connect(False)
        try:
            lost = read_until(process.stderr, "restoring the pipeline, attempt 1 of 3")
        finally:
            connect(True)
        (restored,) = talking.end(process).splitlines()
    assert any(f"({host}, layers" in lost for host in talking.hosts)
    assert "pipeline restored" in restored
    assert ("new=no stage" in restored) == (between == "two stages"), "who is within the head's reach is not lost"


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_machine_out_of_reach(talking: Talking) -> None:
    with (
        stage_on(talking.network, "third") as spare,
        talking.generation(f"execution.spares=['{spare}']", "execution.recovery.attempts=1") as process,
    ):
        talking.network.plug("second", False)
        try:
            talking.end(process)
        finally:
            talking.network.plug("second", True)


@pytest.mark.slow
def test_a_machine_out_of_reach_for_good_is_an_error_in_time(talking: Talking) -> None:
    with talking.generation("execution.recovery.attempts=1", "execution.recovery.timeout_s=4") as process:
        talking.network.plug("second", False)
        pulled = time.monotonic()
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            talking.network.plug("second", True)
    assert time.monotonic() - pulled < 2.5 + 4 + 10, "noticed, tried, and ended, on a machine as busy as may be"
    assert process.returncode == 1
    assert f"not restored within 4 s, still waiting for stage 1 ({talking.hosts[1]}, layers" in errors.decode()
    assert b"Traceback" not in errors
