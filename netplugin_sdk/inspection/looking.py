"""A plugin looked at from outside: its state, the kernel and Docker."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from netplugin_sdk.cnm import remote
from netplugin_sdk.core.engine_api import DockerError
from netplugin_sdk.core.store import StoredNetwork
from netplugin_sdk.errors import DriverError, InvalidRequest, NotFound, Unavailable
from netplugin_sdk.inspection import disk, engine, kernel
from netplugin_sdk.inspection.comparing import compare
from netplugin_sdk.inspection.engine import Engine
from netplugin_sdk.inspection.kernel import NamespaceView
from netplugin_sdk.inspection.model import (
    Difference,
    Fact,
    InspectedNetwork,
    Snapshot,
    about_endpoint,
    about_network,
)
from netplugin_sdk.linux.namespaces import Namespace

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,127}")


def take(plugin: str, folder: Path, *, look_again_after: float = 1.0) -> Snapshot:
    """Look at a plugin of this name, with state in `folder`, in the network namespace of the caller.

    Differences are looked at again after `look_again_after` seconds, since containers come and go; those that remain
    count.

    Raises:
        InvalidRequest: the name cannot be one.
        NotFound: there is no plugin of this name, as far as can be seen.
        Unavailable: neither its state nor Docker can be asked.
    """
    if not _NAME.fullmatch(plugin):
        raise InvalidRequest(f"{plugin!r} cannot be a plugin's name: letters, digits, and _ . - after the first")
    first = _look(plugin, folder)
    if not first.differences:
        return first
    time.sleep(look_again_after)
    second = _look(plugin, folder)
    both = tuple(each for each in second.differences if each in first.differences)
    return msgspec.structs.replace(
        second, differences=both, networks=tuple(_without_passing(network, both) for network in second.networks)
    )


def _without_passing(network: InspectedNetwork, differences: tuple[Difference, ...]) -> InspectedNetwork:
    def kept(facts: tuple[Fact, ...], about: str) -> tuple[Fact, ...]:
        return tuple(
            msgspec.structs.replace(fact, wrong=None)
            if fact.wrong and Difference(about=about, text=fact.wrong) not in differences
            else fact
            for fact in facts
        )

    endpoints = tuple(
        msgspec.structs.replace(endpoint, facts=kept(endpoint.facts, about_endpoint(network, endpoint)))
        for endpoint in network.endpoints
    )
    return msgspec.structs.replace(network, facts=kept(network.facts, about_network(network)), endpoints=endpoints)


def _look(plugin: str, folder: Path) -> Snapshot:
    sources: dict[str, str] = {}
    networks: Mapping[str, StoredNetwork] | None = None
    found: Engine | None = None
    try:
        networks, sources["state"] = disk.read(folder), str(folder)
    except (NotFound, Unavailable) as error:
        sources["state"] = f"not read: {error}"
    here = kernel.host()
    sources["kernel"] = "this host"
    try:
        found = engine.look(plugin)
        sources["docker"] = f"Engine {found.version}"
    except (Unavailable, DockerError) as error:
        sources["docker"] = f"not asked: {error}"
    if networks is None and found is None:
        hint = "" if os.geteuid() == 0 else "; run it as root"
        raise Unavailable(f"there is nothing to compare; state: {sources['state']}; Docker: {sources['docker']}{hint}")
    pid = disk.holder(folder)
    sandboxes, unseen = _sandboxes(networks, found)
    if unseen:
        sources["kernel"] += f"; not the containers' namespaces, nor the firewall: {unseen}"
    served = _is_served(plugin, pid, found)
    if networks is None and not (found and found.networks) and not served:
        text = "nobody listens, and Docker has no network of it"
        raise NotFound(f"there is no plugin {plugin!r}: {text}; state: {sources['state']}")
    snapshot = compare(plugin, networks, found, here, sandboxes)
    differences = snapshot.differences
    if served is False:
        text = "nobody serves it: Docker's calls for its networks fail, and published ports are not held"
        differences = (Difference(about=f"plugin {plugin}", text=text), *differences)
    return msgspec.structs.replace(snapshot, sources=sources, served=served, pid=pid, differences=differences)


def _sandboxes(
    networks: Mapping[str, StoredNetwork] | None, found: Engine | None
) -> tuple[dict[str, NamespaceView | None], str | None]:
    """The views into the sandboxes, by endpoint, None where one is gone; and why some were left out."""
    if os.geteuid() != 0:
        return {}, "that needs root"
    places: dict[str, tuple[Path, ...]] = {}
    for network in (networks or {}).values():
        for endpoint in network.endpoints.values():
            if endpoint.sandbox is not None:
                places[endpoint.id] = (Path(endpoint.sandbox.key),)
    for listed in found.networks.values() if found else ():
        for each in listed.endpoints.values():
            # An engine with a mount namespace of its own has its sandboxes there, and their processes are here.
            if each.container and not any(Namespace(path).exists for path in places.get(each.id, ())):
                with suppress(DockerError, Unavailable):
                    places[each.id] = (*places.get(each.id, ()), *engine.sandbox(each.container))
    seen: dict[str, NamespaceView | None] = {}
    try:
        for endpoint_id, paths in places.items():
            sights = (kernel.inside(path) for path in paths)
            seen[endpoint_id] = next((sight for sight in sights if sight is not None), None)
    except PermissionError:
        return {}, "that is not permitted"
    return seen, None


def _is_served(plugin: str, pid: int | None, found: Engine | None) -> bool | None:
    if pid is not None or (found and found.managed):
        return True
    try:
        url = remote.find(plugin).url
    except DriverError:
        return False
    where = urlsplit(url)
    is_unix = where.scheme == "unix"
    with closing(socket.socket(socket.AF_UNIX) if is_unix else socket.socket()) as probe:
        probe.settimeout(2)
        try:
            probe.connect(where.path if is_unix else (where.hostname, where.port or 443))
        except PermissionError:
            return None
        except OSError:
            return False
    return True
