"""Pictures of a snapshot: SVG, a page of HTML, Mermaid.

A picture is laid out first, as boxes, texts and lines with places, and only then written down. Text is set in a fixed
pitch, so its width is known and nothing is cut off: long texts are wrapped, and boxes grow.

    host ┌ network ──────────────────────┐
         │ name, subnets                 │
         │ [bridge, its addresses      ] │
         │ │  │ veth        │ veth       │
         │ │ ┌┴─────────┐  ┌┴─────────┐  │
         │ │ │ container│  │ container│  │
         │ ├──┬ veth ────────┬ veth      │
         │   ┌┴─────────┐  ┌─┴────────┐  │
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from xml.etree import ElementTree

import msgspec

from netplugin_sdk.inspection.model import Fact, InspectedEndpoint, InspectedNetwork, Port, Snapshot

WIDTH = 1160.0
"""Of a picture, in CSS pixels: what fits a desktop's window."""
_WIDTHS = ((340.0, 0), (700.0, 740), (WIDTH, 1200))
"""Of those in a page: from this width of the window on."""

_PITCH = 0.61  # width of a character / size of the font; DejaVu Sans Mono and Menlo have 0.602, others less
_LEADING = 1.4  # height of a line / size of the font
_FONT = "'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace"
_PAD, _GAP, _TRUNK, _DROP = 12.0, 16.0, 16.0, 30.0
_NAME, _TEXT, _SMALL = 13.0, 12.0, 11.0
_LONGEST = 30  # characters in a line of an endpoint's box
_BREAKS = re.compile(r"(?<=[-_.:/,])")
_MOST_PORTS = 12  # lines of them in a box

_LIGHT = {
    "ground": "fill:#ffffff",
    "host": "fill:#f6f7f9;stroke:#c9ced6",
    "network": "fill:#ffffff;stroke:#aab2bf",
    "broken": "fill:#ffffff;stroke:#c62828;stroke-width:2",
    "bridge": "fill:#e3ecfb;stroke:#3b6fd4",
    "none": "fill:none;stroke:#aab2bf;stroke-dasharray:4 3",
    "endpoint": "fill:#f3f9f3;stroke:#3c8f52",
    "apart": "fill:#fafafa;stroke:#9aa1ab;stroke-dasharray:4 3",
    "port": "fill:#fff3d6;stroke:#d19a1c",
    "wrong": "fill:#fdeceb;stroke:#c62828;stroke-width:2",
    "line": "stroke:#3b6fd4",
    "cut": "stroke:#c62828;stroke-dasharray:4 3",
    "ink": "fill:#1c2330",
    "pale": "fill:#5c6675",
    "alarm": "fill:#b3201b",
}
_DARK = {
    "ground": "fill:#12161c",
    "host": "fill:#171c24;stroke:#39424f",
    "network": "fill:#1d242e;stroke:#4a5564",
    "broken": "fill:#1d242e;stroke:#f0716a",
    "bridge": "fill:#1f3357;stroke:#6f9cf0",
    "none": "fill:none;stroke:#4a5564",
    "endpoint": "fill:#1c3324;stroke:#5fb878",
    "apart": "fill:#1d242e;stroke:#6b7584",
    "port": "fill:#3d3110;stroke:#d9a93a",
    "wrong": "fill:#401c1c;stroke:#f0716a",
    "line": "stroke:#6f9cf0",
    "cut": "stroke:#f0716a",
    "ink": "fill:#e6eaf0",
    "pale": "fill:#a3adba",
    "alarm": "fill:#ff8f88",
}

# ----------------------------------------------------------------------------------------------------------- layout


class Text(msgspec.Struct, frozen=True):
    """A line of text. `y` is its upper edge; sizes in CSS pixels."""

    x: float
    y: float
    text: str
    size: float = _TEXT
    style: str = "ink"
    bold: bool = False

    @property
    def width(self) -> float:
        """At most."""
        return _columns(self.text) * self.size * _PITCH

    @property
    def height(self) -> float:
        """With its leading."""
        return self.size * _LEADING


class Box(msgspec.Struct, frozen=True):
    """A rectangle with what stands in it. `name` is the container's, of an endpoint."""

    x: float
    y: float
    width: float
    height: float
    style: str
    texts: tuple[Text, ...] = ()
    boxes: tuple[Box, ...] = ()
    detail: str = ""
    name: str = ""

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height

    def moved(self, x: float, y: float) -> Box:
        """The same elsewhere, with all that is in it."""
        return msgspec.structs.replace(
            self,
            x=self.x + x,
            y=self.y + y,
            texts=tuple(msgspec.structs.replace(text, x=text.x + x, y=text.y + y) for text in self.texts),
            boxes=tuple(box.moved(x, y) for box in self.boxes),
        )


class Line(msgspec.Struct, frozen=True):
    """From one point to another, across or down."""

    x1: float
    y1: float
    x2: float
    y2: float
    style: str = "line"

    def moved(self, x: float, y: float) -> Line:
        """The same elsewhere."""
        return Line(self.x1 + x, self.y1 + y, self.x2 + x, self.y2 + y, self.style)


class Picture(msgspec.Struct, frozen=True):
    """All of it: a box for the host with one for each network, and the lines between their boxes."""

    host: Box
    lines: tuple[Line, ...]

    @property
    def width(self) -> float:
        """In CSS pixels."""
        return self.host.right + _GAP

    @property
    def height(self) -> float:
        """In CSS pixels."""
        return self.host.bottom + _GAP


def layout(snapshot: Snapshot, width: float = WIDTH) -> Picture:
    """Lay it out no wider than `width` CSS pixels, of which 320 are the least that can be had."""
    room = width - 2 * _GAP - 2 * _PAD
    title = f"{snapshot.plugin} on {snapshot.hostname}"
    if snapshot.served is False:
        title += ", served by nobody"
    head = _stack(_PAD, _PAD, room, [(title, 15.0, "ink" if snapshot.served is not False else "alarm", True)])
    top = _bottom(head, _PAD) + _GAP / 2
    x, y, tallest = _PAD, top, 0.0
    boxes: list[Box] = []
    lines: list[Line] = []
    for network in snapshot.networks:
        box, wires = _network(network, room)
        if boxes and x + box.width > _PAD + room + 0.01:
            x, y, tallest = _PAD, y + tallest + _GAP, 0.0
        boxes.append(box.moved(x, y))
        lines += [wire.moved(x, y) for wire in wires]
        x, tallest = x + box.width + _GAP, max(tallest, box.height)
    if not boxes:
        head += _stack(_PAD, top, room, [("It has no networks.", _TEXT, "pale", False)])
    height = (max(box.bottom for box in boxes) if boxes else _bottom(head, 0)) + _PAD
    right = max([box.right for box in boxes] + [text.x + text.width for text in head])
    host = Box(0, 0, right + _PAD, height, "host", tuple(head), tuple(boxes))
    return Picture(host.moved(_GAP, _GAP), tuple(line.moved(_GAP, _GAP) for line in lines))


def _network(network: InspectedNetwork, room: float) -> tuple[Box, list[Line]]:
    inner = room - 2 * _PAD
    ends = [
        _endpoint(endpoint, min(inner - _TRUNK, _LONGEST * _TEXT * _PITCH + 2 * _PAD)) for endpoint in network.endpoints
    ]
    across = max([end.width for end in ends], default=0.0)
    fit = max(1, math.floor((inner - _TRUNK + _GAP) / (across + _GAP))) if ends else 1
    wrong = [f"≠ {fact.wrong}" for fact in network.facts if fact.wrong]
    about = ", ".join(network.subnets) + (" internal" if network.internal else "")
    wanted = max([180.0, *(_columns(text) * size * _PITCH for text, size in ((network.name, 15.0), (about, _TEXT)))])
    bars = [
        text
        for each in network.interfaces
        for text in (f"{each.name} · {each.kind or 'interface'} · MTU {each.mtu}", *map(str, each.addresses))
    ]
    bar_text = bars or ["no interface of its own on the host"]
    wanted = max(wanted, *(_columns(text) * _TEXT * _PITCH + 2 * _PAD for text in bar_text))
    # As square as it can be, but no narrower than what stands above.
    columns = min(fit, max(math.ceil(math.sqrt(len(ends))), math.floor((wanted - _TRUNK + _GAP) / (across + _GAP)), 1))
    area = _TRUNK + columns * (across + _GAP) - _GAP if ends else 0.0
    within = min(inner, max(wanted, area))
    head = _stack(
        _PAD,
        _PAD,
        within,
        [
            (network.name, 15.0, "ink", True),
            (about, _TEXT, "pale", False),
            *((each, _TEXT, "alarm", False) for each in wrong),
        ],
    )
    y = _bottom(head, _PAD) + _PAD / 2
    texts = _stack(_PAD + _PAD, y + _PAD / 2, within - 2 * _PAD, [(text, _TEXT, "ink", False) for text in bar_text])
    missing = any(fact.name == "interface" and fact.wrong for fact in network.facts)
    style = "wrong" if missing else "bridge" if bars else "none"
    bar = Box(_PAD, y, within, _bottom(texts, y) + _PAD / 2 - y, style, tuple(texts), detail=_detail(network.facts))
    boxes, lines, labels = [bar], list[Line](), list[Text]()
    y = bar.bottom
    for start in range(0, len(ends), columns):
        row = ends[start : start + columns]
        rail = y
        if start:
            rail = y + _GAP
            lines.append(Line(_PAD + 4, rail, _PAD + _TRUNK + (len(row) - 1) * (across + _GAP) + 14, rail))
        for place, end in enumerate(row):
            box = end.moved(_PAD + _TRUNK + place * (across + _GAP), rail + _DROP)
            endpoint = network.endpoints[start + place]
            boxes.append(msgspec.structs.replace(box, width=across))
            cut = bool(bars) and endpoint.outside is not None and endpoint.outside.master is None
            cut = cut or missing or (endpoint.joined and any(f.name == "inside" and f.wrong for f in endpoint.facts))
            lines.append(Line(box.x + 14, rail, box.x + 14, box.y, "cut" if cut else "line"))
            if endpoint.outside is not None:
                label = Text(box.x + 20, rail + (_DROP - _SMALL * _LEADING) / 2, endpoint.outside.name, _SMALL, "pale")
                labels.append(label)
        y = max(box.bottom for box in boxes[1 + start :])
    if len(ends) > columns:
        last = max(line.y1 for line in lines if line.y1 == line.y2)
        lines.insert(0, Line(_PAD + 4, bar.bottom, _PAD + 4, last))
    frame = "broken" if wrong else "network"
    box = Box(0, 0, within + 2 * _PAD, y + _PAD, frame, (*head, *labels), tuple(boxes))
    return box, lines


def _endpoint(endpoint: InspectedEndpoint, room: float) -> Box:
    inner = room - 2 * _PAD
    wrong = [f"≠ {fact.wrong}" for fact in endpoint.facts if fact.wrong]
    inside = endpoint.inside.name if endpoint.inside else ""
    said = [
        (endpoint.name, _NAME, "ink", True),
        *((str(address), _TEXT, "ink", False) for address in endpoint.addresses),
        *(((f"{inside} {endpoint.mac or ''}".strip()), _SMALL, "pale", False) for _ in (0,) if inside or endpoint.mac),
        *((text, _SMALL, "alarm", False) for text in wrong),
    ]
    texts = _stack(_PAD, 8, inner, said)
    y = _bottom(texts, 8)
    chips: list[Box] = []
    for text in port_texts(endpoint.ports):
        lines = _stack(_PAD + 6, y + 6, inner - 12, [(text, _SMALL, "ink", False)])
        width = max(line.width for line in lines) + 12
        chips.append(Box(_PAD, y + 4, width, _bottom(lines, y) + 2 - (y + 4), "port", tuple(lines)))
        y = chips[-1].bottom
    widest = max([text.x + text.width for text in texts] + [chip.right for chip in chips])
    label = 14 + _columns(endpoint.outside.name) * _SMALL * _PITCH if endpoint.outside else 0.0
    style = "wrong" if wrong else "endpoint" if endpoint.joined else "apart"
    detail = _detail(endpoint.facts)
    return Box(
        0, 0, max(widest + _PAD, label + 12, 120.0), y + 8, style, tuple(texts), tuple(chips), detail, endpoint.name
    )


def _stack(x: float, y: float, room: float, texts: Iterable[tuple[str, float, str, bool]]) -> list[Text]:
    """Texts of these sizes and styles, one below the other, wrapped."""
    made: list[Text] = []
    for text, size, style, bold in texts:
        for line in wrap(text, max(8, math.floor(room / (size * _PITCH) + 0.01))):
            made.append(Text(x, y, line, size, style, bold))
            y += size * _LEADING
    return made


def _bottom(texts: Sequence[Text], y: float) -> float:
    return max([text.y + text.height for text in texts], default=y)


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken at spaces, else behind punctuation, else anywhere; all of it is kept."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".lstrip()
        if _columns(joined) <= columns:
            lines[-1] = joined
            continue
        lines.append("")
        parts = [word] if _columns(word) <= columns else _BREAKS.split(word)
        for piece in (piece for part in parts for piece in _pieces(part, columns)):
            if _columns(lines[-1] + piece) > columns:
                lines.append("")
            lines[-1] += piece
    return [line for line in lines if line]


def _pieces(part: str, columns: int) -> Iterator[str]:
    piece = ""
    for character in part:
        if _columns(piece + character) > columns:
            yield piece
            piece = ""
        piece += character
    yield piece


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def port_texts(ports: Iterable[Port]) -> list[str]:
    """A line for each: IPv4 and IPv6 of all addresses together, and numbers in a row as a range."""
    hosts: dict[tuple[int, int, str], set[str]] = defaultdict(set)
    for port in ports:
        address = port.host_address
        text = f"[{address}]" if address.version == 6 else str(address)
        hosts[port.host_port, port.container_port, str(port.protocol)].add(text)
    runs: list[tuple[str, int, int, int, str]] = []
    for (host, container, protocol), addresses in sorted(hosts.items(), key=lambda item: (item[0][2], item[0])):
        where = "" if addresses in ({"0.0.0.0", "[::]"}, {"0.0.0.0"}) else ", ".join(sorted(addresses))
        if runs:
            before, first, to, count, same = runs[-1]
            if (before, same) == (where, protocol) and (first + count, to + count) == (host, container):
                runs[-1] = (where, first, to, count + 1, protocol)
                continue
        runs.append((where, host, container, 1, protocol))
    texts = [f"{where}:{_range(host, n)} → {_range(to, n)}/{protocol}" for where, host, to, n, protocol in runs]
    if len(texts) > _MOST_PORTS:
        more = len(texts) - _MOST_PORTS + 1
        texts = [*texts[: _MOST_PORTS - 1], f"and {more} more published ports"]
    return texts


def _range(first: int, count: int) -> str:
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _detail(facts: Iterable[Fact]) -> str:
    lines = []
    for fact in facts:
        said = {"state": fact.state, "kernel": fact.kernel, "Docker": fact.docker}
        present = {who: text for who, text in said.items() if text is not None}
        if len(set(present.values())) == 1:
            lines.append(f"{fact.name}: {next(iter(present.values()))} ({', '.join(present)})")
        else:
            lines.append(f"{fact.name}: " + "; ".join(f"{who} {text}" for who, text in present.items()))
        if fact.wrong:
            lines.append(f"≠ {fact.wrong}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- SVG


def svg(snapshot: Snapshot, width: float = WIDTH) -> str:
    """A picture in a file of its own, on light ground, or dark where the viewer prefers that."""
    picture = _element(layout(snapshot, width), snapshot)
    style = ElementTree.Element("style")
    style.text = _css("svg")
    picture.insert(1, style)
    ElementTree.indent(picture)
    return ElementTree.tostring(picture, encoding="unicode", xml_declaration=True) + "\n"


def _element(picture: Picture, snapshot: Snapshot) -> ElementTree.Element:
    width, height = math.ceil(picture.width), math.ceil(picture.height)
    root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img", viewBox=f"0 0 {width} {height}")
    root.set("width", str(width))
    root.set("height", str(height))
    ElementTree.SubElement(root, "title").text = _printable(f"Networks of {snapshot.plugin} on {snapshot.hostname}")
    ground = Box(0, 0, width, height, "ground")
    _draw(root, msgspec.structs.replace(ground))
    host = picture.host
    _draw(root, msgspec.structs.replace(host, boxes=()))
    for network in host.boxes:
        _draw(root, msgspec.structs.replace(network, boxes=()))
    for line in picture.lines:
        drawn = ElementTree.SubElement(root, "line", {"class": line.style})
        for name in ("x1", "y1", "x2", "y2"):
            drawn.set(name, f"{getattr(line, name):g}")
    for network in host.boxes:
        for box in network.boxes:
            _draw(root, box)
    return root


def _draw(parent: ElementTree.Element, box: Box) -> None:
    group = ElementTree.SubElement(parent, "g")
    if box.detail:
        group.set("class", "more")
        group.set("tabindex", "0")
        ElementTree.SubElement(group, "title").text = _printable(f"{box.name}\n{box.detail}".strip())
    if box.name:
        group.set("data-name", _printable(box.name))
    place = {name: f"{round(getattr(box, name), 2):g}" for name in ("x", "y", "width", "height")}
    rounded = (
        {} if box.style == "ground" else {"rx": "8" if box.style in ("port", "host", "network", "broken") else "5"}
    )
    ElementTree.SubElement(group, "rect", {"class": box.style, **place, **rounded})
    for text in box.texts:
        baseline = text.y + text.size * 1.08
        drawn = ElementTree.SubElement(group, "text", {"class": text.style, "x": f"{round(text.x, 2):g}"})
        drawn.set("y", f"{round(baseline, 2):g}")
        drawn.set("font-size", f"{text.size:g}")
        if text.bold:
            drawn.set("font-weight", "bold")
        drawn.text = _printable(text.text)
    for inner in box.boxes:
        _draw(group, inner)


def _css(selector: str) -> str:
    def rules(styles: dict[str, str]) -> str:
        return "".join(f"{selector} .{name}{{{style}}}" for name, style in styles.items())

    return (
        f"{selector}{{font-family:{_FONT}}}{selector} text{{white-space:pre}}{rules(_LIGHT)}"
        f"@media(prefers-color-scheme:dark){{{rules(_DARK)}}}"
    )


def _printable(text: str) -> str:
    """XML has no place for control characters."""
    return "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)


# ------------------------------------------------------------------------------------------------------------- HTML


def html(snapshot: Snapshot) -> str:
    """A page that needs nothing else: pictures for narrow and wide windows; each part has a tooltip with its facts."""
    from jinja2 import Environment, PackageLoader  # noqa: PLC0415  # 40 ms that only a page needs
    from markupsafe import Markup  # noqa: PLC0415

    pictures, choose = [], []
    for number, (width, least) in enumerate(_WIDTHS):
        element = _element(layout(snapshot, width), snapshot)
        element.remove(element[0])  # the page has a title of its own
        element.set("class", f"w{number}")
        element.set("aria-label", _printable(f"Networks of {snapshot.plugin}"))
        pictures.append(Markup(ElementTree.tostring(element, encoding="unicode")))
        others = [f"(max-width:{least - 0.02:g}px)"] if least else []
        others += [f"(min-width:{wider}px)" for _, wider in _WIDTHS[number + 1 : number + 2]]
        choose.append(f"@media {','.join(others)}{{.w{number}{{display:none}}}}")
    sources = (f"{name.capitalize()}: {text}" for name, text in snapshot.sources.items())
    page = Environment(loader=PackageLoader("netplugin_sdk.inspection", ""), autoescape=True, trim_blocks=True)
    return page.get_template("page.html.j2").render(
        title=_printable(f"{snapshot.plugin} on {snapshot.hostname}"),
        summary=_printable(". ".join((snapshot.summary, *sources))),
        differences=[_printable(str(each)) for each in snapshot.differences],
        pictures=pictures,
        choose=Markup("".join(choose)),
        font=Markup(_FONT),
        css=Markup(_css("svg")),
    )


# ---------------------------------------------------------------------------------------------------------- Mermaid


def mermaid(snapshot: Snapshot) -> str:
    """A flowchart in Mermaid's language, as Markdown of GitHub and others shows it."""
    lines = ["flowchart LR", f'  subgraph host["{_quoted(f"{snapshot.plugin} on {snapshot.hostname}")}"]']
    outside: list[str] = []
    wrong: list[str] = []
    for number, network in enumerate(snapshot.networks):
        about = [network.name, *network.subnets, *(["internal"] if network.internal else [])]
        lines.append(f'    subgraph n{number}["{_quoted(*about)}"]')
        bridges = [[each.name, *map(str, each.addresses)] for each in network.interfaces] or [
            ["no interface of its own"]
        ]
        lines += [f'      n{number}b{place}["{_quoted(*bridge)}"]' for place, bridge in enumerate(bridges)]
        if any(fact.wrong for fact in network.facts):
            wrong.append(f"n{number}b0")
        for place, endpoint in enumerate(network.endpoints):
            node = f"n{number}e{place}"
            lines.append(f'      {node}(["{_quoted(endpoint.name, *map(str, endpoint.addresses))}"])')
            by = f'|"{_quoted(endpoint.outside.name)}"|' if endpoint.outside else ""
            lines.append(f"      n{number}b0 ---{by} {node}")
            if any(fact.wrong for fact in endpoint.facts):
                wrong.append(node)
            if texts := port_texts(endpoint.ports):
                outside.append(f'  {node} --- {node}p>"{_quoted(*texts)}"]')
        lines.append("    end")
    lines += ["  end", *outside]
    if wrong:
        lines += ["  classDef wrong stroke:#c62828,stroke-width:3px", f"  class {','.join(wrong)} wrong"]
    return "\n".join(lines) + "\n"


def _quoted(*texts: str) -> str:
    """Lines of a label. Mermaid reads HTML in it, and its own entities."""
    return "<br/>".join(
        escape(_printable(text), quote=False).replace("#", "#35;").replace('"', "#quot;") for text in texts
    )
