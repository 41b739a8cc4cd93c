"""Metrics, as Prometheus reads them: over HTTP, from a plugin that is served and called."""

from __future__ import annotations

import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Counter
from prometheus_client.parser import text_string_to_metric_families

from netplugin_sdk import DriverError, Endpoint, Network, Plugin, Unavailable, losses, serve
from netplugin_sdk.core.calls import Call
from netplugin_sdk.serving.metrics import exporting

from ..patience import PATIENCE
from .lab import (
    ENDPOINT,
    NETWORK,
    OTHER_ENDPOINT,
    Docker,
    Options,
    Publisher,
    Recorder,
    copy_state,
    create_endpoint,
    create_network,
    of,
    publishing,
)
from .serving import Echo, connect_unix, echo, nothing_left, post, process, wait_for


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Scrape:
    """What Prometheus would store."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=")
            text = answer.read().decode()
        self.values = {
            (
                sample.name.removeprefix("netplugin_"),
                *(value for _, value in sorted(sample.labels.items())),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __getitem__(self, key: str | tuple[str, ...]) -> float:
        return self.values[(key,) if isinstance(key, str) else key]

    def all(self, name: str) -> dict[tuple[str, ...], float]:
        """The values that are not 0, by their labels."""
        return {key[1:]: value for key, value in self.values.items() if key[0] == name and value}


class Exported:
    def __init__(self, driver: Publisher, port: int, plugin: Plugin) -> None:
        self.driver, self.port, self.plugin = driver, port, plugin
        self.docker = Docker(plugin)

    def scrape(self) -> Scrape:
        return Scrape(self.port)


@pytest.fixture
def exported() -> Iterator[Exported]:
    port = free_port()
    with nothing_left(), Plugin(driver := Publisher()) as plugin, exporting(plugin, "l2", "127.0.0.1", port):
        yield Exported(driver, port, plugin)


def test_a_served_plugin_is_scraped(tmp_path: Path) -> None:
    port = free_port()
    method = "NetworkDriver.AllocateNetwork"
    with process(tmp_path, metrics=("127.0.0.1", port)) as plugin:
        plugin.wait_serving(tmp_path / "s.sock")
        before = Scrape(port)
        assert (before["calls_total", method, "200"], before["call_errors_total", method]) == (0, 0)
        with connect_unix(tmp_path / "s.sock") as client:
            for _ in range(3):
                client.echo(n="1")
            for request, status in (
                (echo(fail="no bridge"), 500),
                (echo(bug="oh"), 500),
                (post(b"[]", method="NetworkDriver.Join"), 400),
                (post(b"{}", method="IpamDriver.RequestPool"), 404),
                (post(b"{}", method="made/up"), 404),
            ):
                client.send(request)
                assert client.receive().status == status
            client.send(echo(started=str(tmp_path / "call")))
            wait_for((tmp_path / "call").exists, "the call to start")
            during = Scrape(port)
            (tmp_path / "call").unlink()
            assert client.receive().status == 200
        after = Scrape(port)
        assert any(line.endswith(f" metrics at http://127.0.0.1:{port}/metrics") for line in plugin.log)
    assert (before["calls_in_progress"], during["calls_in_progress"], after["calls_in_progress"]) == (0, 1, 0)
    assert after.all("calls_total") == {
        (method, "200"): 4,
        (method, "500"): 2,
        ("NetworkDriver.Join", "400"): 1,
        ("unknown", "404"): 2,
    }
    assert after.all("call_errors_total") == {(method,): 2, ("NetworkDriver.Join",): 1}
    assert after.all("call_duration_seconds_count") == {(method,): 6, ("NetworkDriver.Join",): 1}
    assert after.all("build_info") == {("echo", "0.1.0.dev0"): 1}
    assert after["process_resident_memory_bytes"] > 1e6


def test_durations_are_counted_from_a_tenth_of_a_millisecond_to_25_seconds(exported: Exported) -> None:
    exported.docker("CreateNetwork", create_network())
    exported.driver.hooks["create_endpoint"] = lambda _: time.sleep(0.03)
    exported.docker("CreateEndpoint", create_endpoint())
    buckets = {
        key[1]: value
        for key, value in exported.scrape().values.items()
        if key[0] == "call_duration_seconds_bucket" and key[2] == "NetworkDriver.CreateEndpoint"
    }
    assert (min(map(float, buckets)), max(float(edge) for edge in buckets if edge != "+Inf")) == (0.0001, 25)
    assert list(buckets.values()) == sorted(buckets.values()), "cumulative"
    assert (buckets["0.025"], buckets["+Inf"]) == (0, 1)
    assert 0.03 <= exported.scrape()["call_duration_seconds_sum", "NetworkDriver.CreateEndpoint"] < PATIENCE


def test_what_the_plugin_has_is_shown(exported: Exported) -> None:
    docker = exported.docker
    docker("CreateNetwork", create_network())
    docker("CreateEndpoint", create_endpoint())
    docker("CreateEndpoint", create_endpoint(endpoint=OTHER_ENDPOINT))
    docker("ProgramExternalConnectivity", publishing())
    found = exported.scrape()
    assert (found["networks"], found["endpoints"], found["published_ports"]) == (1, 2, 1)
    docker("RevokeExternalConnectivity", of(NETWORK, ENDPOINT))
    docker("DeleteEndpoint", of(NETWORK, ENDPOINT))
    found = exported.scrape()
    assert (found["networks"], found["endpoints"], found["published_ports"]) == (1, 1, 0)


def test_repairs_are_counted_by_their_kind(tmp_path: Path) -> None:
    driver, port = Recorder(), free_port()
    with Plugin(driver, state=tmp_path / "living") as plugin:
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        driver.hooks["create_endpoint"] = lambda _: copy_state(tmp_path / "living", tmp_path / "killed")
        docker("CreateEndpoint", create_endpoint())
    driver = Recorder()
    with Plugin(driver, state=tmp_path / "killed") as plugin, exporting(plugin, "l2", "127.0.0.1", port):
        assert Scrape(port).all("repairs_total") == {("reconciled",): 1, ("half_done",): 1}
        driver.fails["create_network"] = DriverError("no")
        plugin.reconcile()
        wait_for(lambda: Scrape(port)["repairs_total", "reconciled"] == 2, "it to be done again")
        assert Scrape(port).all("repairs_total") == {("reconciled",): 2, ("half_done",): 1, ("failed",): 1}


class Forgotten(Recorder):
    def endpoint_is_gone(self, network: Network[Options], endpoint: Endpoint) -> bool:
        return True


def test_what_vanishes_and_containers_that_ended_unnoticed_are_repairs_too() -> None:
    port = free_port()
    with Plugin(Forgotten()) as plugin, exporting(plugin, "l2", "127.0.0.1", port):
        docker = Docker(plugin)
        docker("CreateNetwork", create_network())
        docker.run()
        docker("Plugin.Activate")  # an engine that was killed
        assert Scrape(port).all("repairs_total") == {("reconciled",): 1, ("container_gone",): 1}
        losses.publish("interface br-1 is gone")
        assert Scrape(port)["repairs_total", "lost"] == 1
        wait_for(lambda: Scrape(port)["repairs_total", "reconciled"] == 2, "it to be brought back")


def test_no_call_is_lost_in_the_count(exported: Exported) -> None:
    def call() -> None:
        for _ in range(500):
            exported.docker("GetCapabilities")

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = exported.scrape()
    method = "NetworkDriver.GetCapabilities"
    assert (found["calls_total", method, "200"], found["call_duration_seconds_count", method]) == (4000, 4000)
    assert found["calls_in_progress"] == 0


def test_a_call_that_was_given_up_counts_as_what_the_engine_was_told() -> None:
    port = free_port()
    with Plugin(Echo()) as plugin, exporting(plugin, "echo", "127.0.0.1", port):
        call = Call()
        assert call.expire()
        assert plugin.handle("/NetworkDriver.GetCapabilities", b"", call).status == 503
        found = Scrape(port)
    assert found.all("calls_total") == {("NetworkDriver.GetCapabilities", "503"): 1}
    assert found.all("call_errors_total") == {("NetworkDriver.GetCapabilities",): 1}


def test_a_drivers_own_metrics_are_shown_too(exported: Exported) -> None:
    tunnels = Counter("test_tunnels", "Of a driver.")
    try:
        tunnels.inc(3)
        assert exported.scrape()["test_tunnels_total"] == 3
    finally:
        REGISTRY.unregister(tunnels)


def test_several_plugins_of_a_process_are_measured_each_for_itself(exported: Exported) -> None:
    port = free_port()
    with Plugin(Recorder()) as other, exporting(other, "other", "127.0.0.1", port):
        Docker(other)("CreateNetwork", create_network())
        assert (Scrape(port)["networks"], exported.scrape()["networks"]) == (1, 0)


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        with pytest.raises(Unavailable, match=rf"^cannot serve metrics on 127.0.0.1 port {address[1]}: .*in use"):
            serve(Echo(), name="echo", socket_path=tmp_path / "s", state=tmp_path, docker=None, metrics=address)
    assert not (tmp_path / "s").exists()


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "netplugin_sdk.serving.metrics")
    with pytest.raises(Unavailable, match=r"prometheus_client: pip install 'netplugin-sdk\[metrics\]'"):
        serve(Echo(), name="echo", socket_path=tmp_path / "s", state=tmp_path, docker=None, metrics=("127.0.0.1", 0))
