"""Pictures: nothing overlaps, nothing is cut off or left out, and what is written is well-formed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from ipaddress import ip_address, ip_interface
from xml.etree import ElementTree

import msgspec
import pytest

from netplugin_sdk import TransportProtocol
from netplugin_sdk.inspection import drawing
from netplugin_sdk.inspection.drawing import Box, Picture, Text, layout, port_texts, wrap
from netplugin_sdk.inspection.kernel import Interface
from netplugin_sdk.inspection.model import Difference, Fact, InspectedEndpoint, InspectedNetwork, Port, Snapshot

LONG = "project_of_a_company-service-with-many-parts.and-a-replica-number-00000001"
SVG = "{http://www.w3.org/2000/svg}"


def interface(name: str, *addresses: str, kind: str = "veth", master: str | None = None) -> Interface:
    return Interface(
        name=name,
        index=3,
        kind=kind,
        mtu=1500,
        mac="02:42:ac:12:00:02",
        up=True,
        master=master,
        link=4,
        addresses=tuple(map(ip_interface, addresses)),
    )


def port(number: int, host: str = "0.0.0.0", container: int = 80, protocol: str = "TCP") -> Port:
    return Port(
        protocol=TransportProtocol[protocol],
        host_address=ip_address(host),
        host_port=number,
        container_port=container,
    )


def endpoint(number: int, name: str, *, ports: Sequence[Port] = (), wrong: str | None = None) -> InspectedEndpoint:
    address = f"172.18.{number // 250}.{number % 250 + 2}/16"
    six = f"fd00:1234:5678:9abc:def0:1234:5678:{number + 2:x}/64"
    return InspectedEndpoint(
        id=f"{number:064x}",
        name=name,
        joined=number % 7 != 5,
        addresses=tuple(map(ip_interface, (address, six) if number % 2 else (address,))),
        mac="02:42:ac:12:00:02",
        outside=interface(f"ve-{number:012x}", master="br-1") if number % 5 != 4 else None,
        inside=interface("eth0"),
        ports=tuple(ports),
        facts=(Fact(name="IPv4", state=address, kernel=address, docker=address, wrong=wrong),),
    )


def network(
    name: str, *endpoints: InspectedEndpoint, wrong: str | None = None, bridge: bool = True
) -> InspectedNetwork:
    return InspectedNetwork(
        id="ca75" * 16,
        name=name,
        internal=True,
        subnets=("172.18.0.0/16", "fd00:1234:5678:9abc::/64"),
        interfaces=(interface("br-1", "172.18.0.1/16", "fd00:1234:5678:9abc::1/64", kind="bridge"),) if bridge else (),
        endpoints=endpoints,
        facts=(Fact(name="interface", kernel="none", wrong=wrong),),
    )


def of(*networks: InspectedNetwork, differences: tuple[Difference, ...] = ()) -> Snapshot:
    return Snapshot(
        plugin="myplugin",
        hostname="host",
        sources={"state": "/var/lib/netplugin/myplugin"},
        served=True,
        pid=1,
        networks=networks,
        differences=differences,
    )


PORTS = [port(8080), port(8080, "::"), port(8443, "127.0.0.1", 443), port(53, "2001:db8:1:2:3:4:5:6", 53, "UDP")]
CASES = {
    "nothing": of(),
    "one network without containers": of(network("red")),
    "one container": of(network("red", endpoint(1, "web", ports=PORTS))),
    "forty containers": of(network("red", *(endpoint(n, LONG if n % 3 else "web", ports=PORTS) for n in range(40)))),
    "twenty networks": of(
        *(
            network(f"net{n}", *(endpoint(10 * n + m, f"web{m}") for m in range(n % 6)), bridge=n % 4 != 3)
            for n in range(20)
        )
    ),
    "long names": of(network(f"{LONG}-{LONG}-{LONG}", endpoint(1, f"{LONG}{LONG}"), endpoint(2, "網" * 60))),
    "differences": of(
        network("red", endpoint(1, "web", wrong="IPv4: state has 172.18.0.2/16, kernel has none"), wrong=f"no {LONG}")
    ),
    "many ports": of(network("red", endpoint(1, "web", ports=[port(8000 + 2 * n) for n in range(100)]))),
}
WIDTHS = (340.0, 700.0, drawing.WIDTH)

pictures = pytest.mark.parametrize(
    ("snapshot", "width"),
    [(snapshot, width) for snapshot in CASES.values() for width in WIDTHS],
    ids=[f"{name}-{width:g}" for name in CASES for width in WIDTHS],
)


def boxes(box: Box) -> Iterator[Box]:
    yield box
    for inner in box.boxes:
        yield from boxes(inner)


def within(box: Box) -> list[Box | Text]:
    return [*box.texts, *box.boxes]


def texts(picture: Picture) -> str:
    return " ".join(text.text for box in boxes(picture.host) for text in box.texts)


def apart(one: Box | Text, other: Box | Text) -> bool:
    return (
        one.x + one.width <= other.x + 0.01
        or other.x + other.width <= one.x + 0.01
        or one.y + one.height <= other.y + 0.01
        or other.y + other.height <= one.y + 0.01
    )


@pictures
def test_nothing_overlaps_and_all_is_inside(snapshot: Snapshot, width: float) -> None:
    picture = layout(snapshot, width)
    assert picture.width <= width + 0.01
    for box in boxes(picture.host):
        for one, other in itertools.combinations(within(box), 2):
            assert apart(one, other), (one, other)
        for inner in within(box):
            assert box.x <= inner.x
            assert inner.x + inner.width <= box.x + box.width + 0.01
            assert box.y <= inner.y
            assert inner.y + inner.height <= box.y + box.height + 0.01


@pictures
def test_no_line_crosses_a_box_or_a_text(snapshot: Snapshot, width: float) -> None:
    picture = layout(snapshot, width)
    for line in picture.lines:
        assert line.x1 == line.x2 or line.y1 == line.y2
        way = Box(line.x1, line.y1, line.x2 - line.x1, line.y2 - line.y1, "line")
        for panel in picture.host.boxes:
            for other in within(panel):
                assert apart(way, other), (way, other)


@pictures
def test_all_of_it_is_there_whatever_its_length(snapshot: Snapshot, width: float) -> None:
    drawn = re.sub(r"\s", "", texts(layout(snapshot, width)))
    for net in snapshot.networks:
        assert net.name in drawn
        for end in net.endpoints:
            assert end.name in drawn
            for address in end.addresses:
                assert str(address) in drawn
            if end.outside:
                assert end.outside.name in drawn
            for fact in (*net.facts, *end.facts):
                assert re.sub(r"\s", "", fact.wrong or "") in drawn


@pictures
def test_each_container_hangs_on_its_bridge(snapshot: Snapshot, width: float) -> None:
    picture = layout(snapshot, width)
    ends = [box for panel in picture.host.boxes for box in panel.boxes if box.name]
    assert len(ends) == sum(len(net.endpoints) for net in snapshot.networks)
    for end in ends:
        assert any(line.x1 == line.x2 and end.x < line.x1 < end.right and line.y2 == end.y for line in picture.lines)


@pytest.mark.parametrize("snapshot", CASES.values(), ids=list(CASES))
def test_svg_is_well_formed_and_stands_alone(snapshot: Snapshot) -> None:
    text = drawing.svg(snapshot)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    drawn = re.sub(r"\s", "", "".join(each.text or "" for each in root.iter(f"{SVG}text")))
    assert all(end.name in drawn for net in snapshot.networks for end in net.endpoints)
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"(href|src)=|url\(|@import", text)
    styles = {each.get("class") for tag in ("rect", "text", "line") for each in root.iter(f"{SVG}{tag}")}
    assert styles <= set(drawing._LIGHT) == set(drawing._DARK)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert not {"src", "href", "xlink:href"} & given.keys()
        self.names += [given["data-name"] or ""] if "data-name" in given else []


def test_the_page_needs_nothing_else_and_is_drawn_for_each_width() -> None:
    snapshot = msgspec.structs.replace(
        CASES["differences"], differences=(Difference(about="network <red> & more", text="no bridge"),)
    )
    text = drawing.html(snapshot)
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == len(WIDTHS) == len(page.names)
    assert "&lt;red&gt; &amp; more: no bridge" in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


EVIL = '<script>alert("1")</script>\x00 #1 & "quotes" ]]>'


@pytest.mark.parametrize("write", [drawing.svg, drawing.html, drawing.mermaid])
def test_names_are_text(write: object) -> None:
    assert callable(write)
    text = write(of(network(EVIL, endpoint(1, EVIL), wrong=EVIL), differences=(Difference(about=EVIL, text=EVIL),)))
    assert "<script>alert" not in text
    assert "\x00" not in text
    if write is drawing.svg:
        ElementTree.fromstring(text)


def test_mermaid_names_each_and_quotes_labels() -> None:
    text = drawing.mermaid(of(network("red", endpoint(1, 'web"1', ports=PORTS)), network("blue", endpoint(2, "db"))))
    assert text.startswith("flowchart LR\n")
    assert 'n0e0(["web#quot;1<br/>172.18.0.3/16' in text
    assert 'n0b0 ---|"ve-000000000001"| n0e0' in text
    assert 'n0e0 --- n0e0p>":8080 → 80/tcp<br/>127.0.0.1:8443 → 443/tcp<br/>' in text
    assert 'n1e0(["db' in text
    assert text.count("subgraph") == text.count("\n    end") + text.count("\n  end")


def test_ports_are_put_together() -> None:
    both = [port(8000 + n, host, 80 + n) for n in range(10) for host in ("0.0.0.0", "::")]
    assert port_texts(both) == [":8000-8009 → 80-89/tcp"]
    assert port_texts([port(1), port(3), port(3, protocol="UDP")]) == [":1 → 80/tcp", ":3 → 80/tcp", ":3 → 80/udp"]
    assert port_texts([port(1, "::1")]) == ["[::1]:1 → 80/tcp"]
    assert port_texts([port(2 * n) for n in range(1, 101)])[-1] == "and 89 more published ports"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("short", ["short"]),
        ("two words", ["two words"]),
        ("these are some words", ["these are", "some words"]),
        ("a-name.with_parts", ["a-name.", "with_parts"]),
        ("0123456789abc", ["0123456789", "abc"]),
        ("網網網網網網", ["網網網網網", "網"]),
    ],
)
def test_wrapped(text: str, lines: list[str]) -> None:
    assert wrap(text, 10) == lines
