"""How Sphinx builds the documentation: `make docs`. Nothing is fetched, and the pages fetch nothing."""

from __future__ import annotations

import importlib.metadata
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from docutils import nodes
from sphinx import addnodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.util.nodes import make_refnode

import netplugin_sdk
from netplugin_sdk import cnm
from netplugin_sdk.linux import namespaces
from netplugin_sdk.testing import conformance, engine, kit

project = "netplugin_sdk"
author = "the netplugin_sdk authors"
version = release = importlib.metadata.version("netplugin-sdk")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
default_role = "py:obj"  # in our docstrings a name stands in single backticks
nitpicky = True
smartquotes = False  # two hyphens are an option

html_theme = "furo"
pygments_dark_style = "monokai"  # not the theme's own, which underlines names as if they were links
html_title = "netplugin_sdk"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_ambiguous"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 76
napoleon_numpy_docstring = False

_NAME = re.compile(r"([a-z_]+\.)*[A-Z]\w*[a-z]\w*(\.\w+)?|(links|firewall|ports|sysctls|conformance)\.[a-z_]+")
nitpick_ignore = [  # in signatures, and not for authors
    ("py:class", "netplugin_sdk.core.calls.Call"),
    ("py:class", "netplugin_sdk.cnm.registry.Driver"),
    ("py:class", "netplugin_sdk.testing.conformance.session.Exchange"),
    ("py:class", "netplugin_sdk.testing.recording.Exchange"),
    ("py:class", "netplugin_sdk.testing.conformance.session.Session"),
    ("py:class", "StartResponse"),
    ("py:class", "WSGIEnvironment"),
]

# Its annotations are of what it imports for a type checker only.
vars(kit).update(
    {name: getattr(netplugin_sdk, name) for name in netplugin_sdk.__all__},
    Namespace=namespaces.Namespace,
    Network=cnm.Network,
    NetworkController=cnm.NetworkController,
    PrivateEngine=engine.PrivateEngine,
    Report=conformance.Report,
    Sandbox=cnm.Sandbox,
)


def _find(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """The target of a name in backticks, where Sphinx does not find it as it stands.

    A public name is documented where authors import it from; a docstring may name it by where it is defined, or by its
    end, and a field is described with its class. A name that begins with a small letter and is not ours is a
    parameter or a program: shown as it is. Names of others are not linked, since nothing is fetched. Any other name is
    a mistake, and Sphinx says so.
    """
    if node.get("refdomain") != "py":
        return None
    target: str = node["reftarget"].lstrip(".~")
    for name in (target, target.rpartition(".")[0]):  # itself, or its class
        if found := _documented(env, name):
            place = env.domaindata["py"]["objects"][found]
            return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, content, found)
    return content if _is_no_name(node["reftype"], target) or _is_elsewhere(target) else None


def _documented(env: BuildEnvironment, target: str) -> str | None:
    """The full name by which something is documented; the shortest, if its end is that of several."""
    ends = [f".{target}"]
    if target.startswith("netplugin_sdk."):
        ends.append("." + target.rpartition(".")[2])  # imported from another module than it is defined in
    found = [name for name in env.domaindata["py"]["objects"] if name.endswith(tuple(ends))]
    if target.islower() and "." not in target:  # not whatever method is called so: one of a driver's
        found = [name for name in found if "Driver." in name]
    return min(found, key=lambda name: (name.count("."), name), default=None) if target else None


def _is_no_name(kind: str, target: str) -> bool:
    return kind == "obj" and re.fullmatch(r"[A-Z_]+|[a-z_][a-z_0-9]*|[^A-Za-z_].*|.*[ =].*", target) is not None


def _is_elsewhere(target: str) -> bool:
    """Whether it is a name of somebody else, a type variable, or a module that authors do not import."""
    for name in (target, *(f"{module}.{target}" for module in ("builtins", "contextlib", "msgspec", "socket"))):
        try:
            found = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError):
            continue
        return isinstance(found, TypeVar | ModuleType) or not name.startswith("netplugin_sdk")
    return False


def _linked(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Link public names in backticks in a page's text, too, to their description."""
    for link in list(doctree.findall(nodes.reference)):
        if re.match(r"https?://[A-Z]+\b", link.get("refuri", "")):  # http://ADDRESS:PORT of a command's help
            link.replace_self(link.children)
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext()
        if not _NAME.fullmatch(name) or isinstance(
            literal.parent, nodes.title | nodes.reference | addnodes.desc_signature
        ):
            continue
        if found := _documented(app.env, name):
            place = app.env.domaindata["py"]["objects"][found]
            content = nodes.literal("", name, classes=["xref", "py", "py-obj"])
            literal.replace_self(make_refnode(app.builder, page, place.docname, place.node_id, content, found))


def _indented(_app: Sphinx, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """An indented paragraph of a docstring is an example: to reStructuredText it would be a quotation."""
    for number in range(len(lines) - 1, 1, -1):
        before, blank, line = lines[number - 2 : number + 1]
        paragraph = before[:1].strip() and not before.startswith("- ") and not before.endswith("::")
        if paragraph and not blank and line.startswith("    "):
            lines[number:number] = ["::", ""]


def _signature(
    _app: Sphinx, what: str, name: str, _object: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Networks, endpoints and sandboxes are given to drivers, who do not make them; defaults are as one writes them."""
    given = {f"netplugin_sdk.{place}{kind}" for place in ("", "cnm.") for kind in ("Network", "Endpoint", "Sandbox")}
    if what == "class" and name in {*given, "netplugin_sdk.Later"}:
        return "", None
    return re.sub(r"<(?:([\w.]+):)?[^>]*>", lambda default: default[1] or "...", signature or "") or signature, returns


def _included(_app: Sphinx, path: Path, _parent: str, content: list[str]) -> None:
    """Make the README of an example a page: its links lead to pages, and its diagrams are pictures."""
    text = content[0].replace("(../../README.md)", "(index.md)").replace("(../../docs/", "(")
    text = re.sub(r"\(\.\./(\w+)/README\.md\)", r"(\1.md)", text)
    picture = f"![What is written here in words](pictures/{path.parent.name}.svg)\n"
    content[0] = re.sub(r"^```mermaid\n.*?^```$", picture, text, flags=re.MULTILINE | re.DOTALL)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("missing-reference", _find)
    app.connect("include-read", _included)
    app.connect("doctree-resolved", _linked)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _indented, priority=400)  # before Napoleon
    # Napoleon takes what stands before a colon in an attribute's docstring for its type.
    napoleon: Any = GoogleDocstring
    napoleon._consume_inline_attribute = lambda self: ("", self._dedent(self._consume_to_end()))
