"""Refuse answers that would make a project that does not work. Rendered, and run before anything is generated."""

import json
import keyword
import re
import sys

ANSWERS = json.loads({{ cookiecutter | tojson | tojson }})  # whatever is in them, this line is Python

DOCKERS_OWN = {"bridge", "default", "host", "ipvlan", "macvlan", "none", "null", "overlay"}
"""Names of drivers and networks that the engine does not look for among the plugins."""

TAKEN = {
    *("managed", "systemd", "tests"),
    *("click", "httptools", "jinja2", "markupsafe", "msgspec", "netplugin_sdk", "pyroute2", "typing_extensions"),
    *("hatchling", "mypy", "pytest", "ruff", "werkzeug"),
    "test",  # Python's own, and not among sys.stdlib_module_names
    *sys.stdlib_module_names,
}
"""A package of such a name would hide another one."""


def is_slug(text: str) -> bool:
    return bool(re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*", text)) and len(text) <= 64 and text != "netplugin-sdk"


def is_plugin_name(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", text)) and text not in DOCKERS_OWN


def is_package_name(text: str) -> bool:
    is_name = re.fullmatch(r"[a-z][a-z0-9_]{0,63}", text) is not None
    return is_name and not keyword.iskeyword(text) and text not in TAKEN


def is_line(text: str) -> bool:
    """Whether it stands between the quotes of TOML, JSON and Python as it is."""
    return 0 < len(text) <= 90 and text.isprintable() and text == text.strip() and not set('"\\') & set(text)


def is_email(text: str) -> bool:
    """Of the usual form; the package's metadata take no letters beyond ASCII in it."""
    words = r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*"
    return len(text) <= 90 and bool(re.fullmatch(f"{words}@{words}", text))


LINE = 'one line of up to 90 characters, without " and \\'
RULES = {
    "project_name": (is_line, LINE),
    "project_slug": (is_slug, "lower-case letters and digits, and single - _ . between them, up to 64, not netplugin-sdk"),
    "plugin_name": (
        is_plugin_name,
        "letters, digits, and _ . - after the first, up to 64, and none of Docker's own names (bridge, host, null …)",
    ),
    "package_name": (
        is_package_name,
        "a lower-case letter, then lower-case letters, digits and _, up to 64; no keyword, no module of Python's"
        " standard library, and none that the project uses itself",
    ),
    "description": (is_line, LINE),
    "author": (is_line, LINE),
    "email": (is_email, "an address like first.last@example.com"),
}

for name, (is_allowed, allowed) in RULES.items():
    if not is_allowed(ANSWERS[name]):
        sys.exit(f"{name} cannot be {ANSWERS[name]!r}. Allowed: {allowed}")
