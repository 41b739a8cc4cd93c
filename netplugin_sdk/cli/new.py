"""`netplugin new`: a driver project from the template, as cookiecutter makes it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

# Not cookiecutter itself: it would bring requests, rich, arrow and 13 more into the environment of every plugin. The
# part that this template needs is below; a test compares the results of both generators, byte for byte.
from jinja2 import Environment, FileSystemLoader, StrictUndefined

_PROJECT = "{{cookiecutter.project_slug}}"
"""The template's folder of that name is the project."""


@click.command(short_help="Make a driver project.")
@click.argument("name", required=False)
@click.option(
    "--output",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    default=Path(),
    metavar="DIR",
    help="The project is a new folder in this one, by default the current one.",
)
@click.option("--no-input", is_flag=True, help="Ask nothing: take the defaults.")
@click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help="An answer; may be repeated.")
def new(*, name: str | None, output: Path, no_input: bool, pairs: tuple[str, ...]) -> None:
    """Make an installable driver project: a working driver, tests, systemd units, a managed plugin, CI.

    NAME is the project's; the folder, the package and what docker calls the driver follow from it. The
    command asks for answers that are not given.

    \b
    Keys for --set, in the order of the questions:
      project_name, project_slug (the folder), plugin_name, package_name,
      description, author, email, license (MIT, Apache-2.0, BSD-3-Clause, none)
    """
    template = _template()
    config = json.loads((template / "cookiecutter.json").read_text("utf-8"))
    environment = Environment(
        loader=FileSystemLoader(template),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        **config["_jinja2_env_vars"],
    )
    answers = _answers(config, environment, _given(name, pairs, config), ask=not no_input)
    _run_hook(environment, answers)
    project = output / answers["project_slug"]
    if os.path.lexists(project):
        raise click.ClickException(f"{project} exists already")
    try:
        with TemporaryDirectory(prefix=".netplugin-new-", dir=output) as building:
            made = Path(building, project.name)
            _generate(template, environment, answers, made)
            made.rename(project)
    except OSError as error:
        raise click.ClickException(f"{project} cannot be made: {error}") from error
    click.echo(
        f"{project} is made. In it, and in a virtual environment:\n\n"
        "    pip install -e '.[dev]'\n"
        "    pytest          # root's tests make networks, and start a private Docker Engine\n"
        f"    {answers['plugin_name']}       # as root: serves it to this machine's Docker\n\n"
        "README.md says more."
    )


def _template() -> Path:
    """An installed package has it beside this file; a clone has it where cookiecutter looks for it."""
    installed = Path(__file__).with_name("template")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "cookiecutter"


def _given(name: str | None, pairs: tuple[str, ...], config: Mapping[str, Any]) -> dict[str, str]:
    """The answers of the command line."""
    given = {} if name is None else {"project_name": name}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key.startswith("_") or key not in config:
            keys = ", ".join(key for key in config if not key.startswith("_"))
            raise click.BadParameter(f"{pair!r} is not a KEY=VALUE with one of the keys {keys}", param_hint="--set")
        if isinstance(config[key], list) and value not in config[key]:
            raise click.BadParameter(f"{key} is one of {', '.join(config[key])}", param_hint="--set")
        given[key] = value
    return given


def _answers(
    config: Mapping[str, Any], environment: Environment, given: Mapping[str, str], *, ask: bool
) -> dict[str, str]:
    """One for each key, in the order of the file, since a default may follow from earlier answers."""
    answers: dict[str, str] = {}
    for key, default in config.items():
        if key.startswith("_"):
            continue
        if key in given:
            answers[key] = given[key]
        elif isinstance(default, list):
            kind = click.Choice(default)
            answers[key] = click.prompt(config["__prompts__"][key], default[0], type=kind) if ask else default[0]
        else:
            text = environment.from_string(default).render(cookiecutter=answers)
            answers[key] = click.prompt(config["__prompts__"][key], text) if ask else text
    return answers


def _run_hook(environment: Environment, answers: Mapping[str, str]) -> None:
    """Let the template's own check of the answers refuse them."""
    script = environment.get_template("hooks/pre_gen_project.py").render(cookiecutter=answers)
    done = subprocess.run([sys.executable, "-I", "-c", script], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise click.ClickException(done.stderr.strip())


def _generate(template: Path, environment: Environment, answers: Mapping[str, str], made: Path) -> None:
    for source in _files(template / _PROJECT):
        name = source.relative_to(template)
        target = made / environment.from_string(str(name.relative_to(_PROJECT))).render(cookiecutter=answers)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(environment.get_template(str(name)).render(cookiecutter=answers), "utf-8")
        shutil.copymode(source, target)


def _files(folder: Path) -> Iterator[Path]:
    """All files except those that pip compiled when it installed the package."""
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
