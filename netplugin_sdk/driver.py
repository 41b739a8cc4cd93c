"""`NetworkDriver` and `IpamDriver`: the classes that an author subclasses."""

from __future__ import annotations

import typing
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, Protocol

from netplugin_sdk.errors import InvalidDriver
from netplugin_sdk.network import Endpoint, Network, OptionsT, Sandbox
from netplugin_sdk.protocol.messages import (
    AddressRef,
    AddressRequest,
    AllocateNetwork,
    EndpointInterface,
    EndpointOptions,
    Join,
    NetworkOptions,
    Node,
    Pool,
    PoolRequest,
    Scope,
    SkipGateway,
)
from netplugin_sdk.protocol.options import DriverOptions, check_types
from netplugin_sdk.values import Container, IPAddress, IPInterface, UsedPool

P = ParamSpec("P")


class Later:
    """Work for after the answer: ``return Later(links.delete, bridge)``.

    `function` is called with the arguments once Docker has its answer; an exception of it is logged. Raises TypeError
    if it cannot be called.
    """

    def __init__(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        if not callable(function):
            raise TypeError(f"Later takes a function and its arguments, got {function!r}")
        self._call = partial(function, *args, **kwargs)

    def __call__(self) -> None:
        """Do it."""
        self._call()

    def __repr__(self) -> str:
        return f"Later({self._call.func!r})"


class DriverView(Protocol):
    """A driver's view of its plugin; see the properties of `NetworkDriver`."""

    @property
    def networks(self) -> Mapping[str, Network[Any]]:
        """All networks by id."""

    @property
    def allocations(self) -> Mapping[str, Mapping[str, str]]:
        """Options by the network's id."""

    @property
    def this_node(self) -> Node | None:
        """This host."""

    @property
    def peers(self) -> Mapping[IPAddress, Node]:
        """The other nodes by address."""


class _Unbound:
    """The view of a driver that no plugin has yet."""

    networks: Mapping[str, Network[Any]] = MappingProxyType({})
    allocations: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    this_node: Node | None = None
    peers: Mapping[IPAddress, Node] = MappingProxyType({})


class _DriverType(ABCMeta):
    """An abstract class that says, when it is called, which methods are missing and which names look like them."""

    if not TYPE_CHECKING:  # a class is called as it says itself

        def __call__(cls, *args, **kwargs):  # noqa: ANN002, ANN003, ANN204
            """Raise `InvalidDriver` where a method is missing."""
            if missing := sorted(cls.__abstractmethods__):
                import difflib  # noqa: PLC0415  # 2 ms that only mistakes need

                ours = {name for base in cls.__mro__ if base.__module__ == __name__ for name in vars(base)}
                own = [name for name in dir(cls) if not name.startswith("_") and name not in ours]
                alike = [(name, *difflib.get_close_matches(name, own, n=1, cutoff=0.75)) for name in missing]
                hints = [f"did you mean {wanted} by {found[0]}?" for wanted, *found in alike if found]
                hint = f" ({' '.join(hints)})" if hints else ""
                raise InvalidDriver(f"{cls.__name__} has no {', '.join(missing)}, which it must have{hint}")
            return super().__call__(*args, **kwargs)


class NetworkDriver(Generic[OptionsT], metaclass=_DriverType):
    """A Docker network driver: four methods that must be written, and some that may be.

    Before the SDK calls a method it decodes and checks the request, looks up the network and the endpoint, and answers
    a repeated request, which the engine sends after a lost connection, from memory. So a
    method sees each change once, with objects that exist. Calls on one network come one after the other, calls on
    different networks in parallel from different threads.

    A method must keep two rules: it can be run twice, since the plugin may be killed inside it and the engine ask
    again; and `delete_network`, `delete_endpoint` and `leave` succeed where there is little or nothing to remove,
    since they also undo a `create_network`, `create_endpoint` or `join` that failed half-way. An exception reaches
    `docker` as one line: a `DriverError` by its text, any other by its type and text, with the traceback in the log.

    Capabilities follow from what the subclass overrides; see the optional methods. A driver with ``-o`` options
    names their class: ``class L2(NetworkDriver[L2Options])``.
    """

    scope: ClassVar[Scope] = Scope.LOCAL
    """Whether networks belong to this host, or to the swarm (``GetCapabilities``, ``Scope``)."""

    options_type: ClassVar[type[DriverOptions]] = DriverOptions
    """The class of the driver's ``-o`` options, taken from the subclass's base ``NetworkDriver[…]``."""

    cluster_numbers: ClassVar[Mapping[str, range]] = MappingProxyType({})
    """Numbers of which each network gets one of its own, unique in the swarm; for drivers of global scope.

    ``{"vni": range(4096, 1 << 24)}`` gives each a VNI: the SDK answers ``AllocateNetwork`` with it on the managers, and
    it is the option ``vni`` of the network on every node. ``-o vni=5000`` asks for a certain one.
    """

    _view: DriverView = _Unbound()

    def bind(self, view: DriverView) -> None:
        """Take the driver's view of its plugin. The SDK calls it, before `open`."""
        self._view = view

    @property
    def networks(self) -> Mapping[str, Network[OptionsT]]:
        """All networks of the plugin by id, from before `create_network` until after `delete_network`.

        A mapping that was read does not change, so any thread may iterate over it.
        """
        return self._view.networks

    @property
    def allocations(self) -> Mapping[str, Mapping[str, str]]:
        """The options that this manager allocated, by the network's id, until it was asked to free them.

        It remembers over restarts. A network that another manager freed stays in it.
        """
        return self._view.allocations

    @property
    def this_node(self) -> Node | None:
        """This host as a node of the swarm; None until the engine has told.

        `Node.address` is that of its data path. If it changes, `create_network` runs again for each network.
        """
        return self._view.this_node

    @property
    def peers(self) -> Mapping[IPAddress, Node]:
        """The other nodes of the swarm by address, as the engine has told, in this life of the plugin or before.

        Known from before `create_network`, for drivers of global scope and those that override `peer_joined`. A mapping
        that was read does not change.
        """
        return self._view.peers

    def __init_subclass__(cls) -> None:
        """Find the class of options in the bases. Raises TypeError if an option has a type that no text can have."""
        super().__init_subclass__()
        if "options_type" not in cls.__dict__:
            cls._find_options()
        with suppress(NameError):  # a type that is defined later; it is checked when the plugin starts
            check_types(cls.options_type)

    @classmethod
    def _find_options(cls) -> None:
        for base in cls.__dict__.get("__orig_bases__", ()):
            origin = typing.get_origin(base)
            if isinstance(origin, type) and issubclass(origin, NetworkDriver):
                for given in typing.get_args(base):
                    if isinstance(given, type) and issubclass(given, DriverOptions):
                        cls.options_type = given

    def open(self, folder: Path | None) -> None:
        """Begin, before the first call. `folder` is the plugin's own, to keep files in; None if it has none."""

    def close(self) -> None:
        """End, after the last call. Threads that were started end here."""

    @abstractmethod
    def create_network(self, network: Network[OptionsT]) -> None:
        """Ensure that the network is there: also runs at every start, for each network (``CreateNetwork``).

        So it makes missing parts and leaves correct ones alone. The engine asks once, at ``docker network create``, and
        never again: `network` is remembered, and given to every later method. When the plugin starts, on SIGHUP, and
        when an interface or address of the plugin's vanished from the kernel, the SDK runs this method for the networks
        that exist; at a start before any request is answered.
        """

    @abstractmethod
    def delete_network(self, network: Network[OptionsT]) -> Later | None:
        """Remove the network (``DeleteNetwork``). Its endpoints are gone.

        Returns:
            Work that may be done after the answer, such as ``Later(links.delete, bridge)``, for which the kernel takes
            36 ms; None if all is done. The network stays on disk until it is done, so if the plugin dies before, this
            method runs again when it starts. Networks are created only when it is done.
        """

    def create_endpoint(
        self,
        network: Network[OptionsT],  # noqa: ARG002
        endpoint: Endpoint,  # noqa: ARG002
    ) -> EndpointInterface | None:
        """Prepare a container's attachment (``CreateEndpoint``).

        Returns:
            Addresses that `Endpoint.requested` left None and that the driver gives; None if it gives none.
        """
        return None

    @abstractmethod
    def delete_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> Later | None:
        """Remove everything that is left of the endpoint (``DeleteEndpoint``). It has left its sandbox.

        Returns:
            Work that may be done after the answer, as from `delete_network`; None if all is done.
        """

    @abstractmethod
    def join(self, network: Network[OptionsT], endpoint: Endpoint, sandbox: Sandbox) -> Join:
        """Make the link that the engine moves into the container (``Join``)."""

    def leave(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        """Take the endpoint out of its sandbox (``Leave``).

        The engine moves the link that `join` named back to the plugin's network namespace afterwards, and complains in
        its log if the link is gone; Engine 28 then also counts it as still there when it numbers the container's next
        interface. So the place to delete it is `delete_endpoint`.
        """

    # ------------------------------------------------------------------------------ optional methods

    def endpoint_oper_info(self, network: Network[OptionsT], endpoint: Endpoint) -> Mapping[str, Any]:  # noqa: ARG002
        """Facts of the endpoint that the driver knows (``EndpointOperInfo``; after `join` and on each inspect).

        The values may be JSON values, addresses, `Port` and `PortMapping`.
        """
        return {}

    def program_external_connectivity(
        self, network: Network[OptionsT], endpoint: Endpoint, options: EndpointOptions
    ) -> None:
        """Publish `EndpointOptions.port_map` (``ProgramExternalConnectivity``).

        Called for the endpoint that carries its container's default route, again with other options if they change, and
        by the SDK when the plugin starts, for ports that were published before; after a reboot the container may be
        gone. Override it together with `revoke_external_connectivity`.
        """
        raise NotImplementedError

    def revoke_external_connectivity(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        """Undo `program_external_connectivity` (``RevokeExternalConnectivity``); also before a `leave` without it."""

    def restore_endpoint(self, network: Network[OptionsT], endpoint: Endpoint) -> None:
        """Bring back the work of `join`, as far as that is possible while the container runs.

        The SDK calls it for each endpoint in a sandbox after `create_network` has run again: when the plugin starts, on
        SIGHUP, and when an interface or address vanished from the kernel. If somebody deleted the bridge, for example,
        make the pairs its ports again.
        """

    def container_attached(self, network: Network[OptionsT], endpoint: Endpoint, container: Container) -> None:
        """Learn which container an endpoint is in: its name, labels, Compose project.

        Docker does not tell with `join`, and must not be asked while it waits for an answer. If a driver overrides
        this, the SDK asks after `join`, in the background: the container may run already. Each endpoint is reported
        once for each `join`, or again if the plugin was killed meanwhile; then it is `Endpoint.container`. Exceptions
        are logged.
        """

    def endpoint_is_gone(self, network: Network[OptionsT], endpoint: Endpoint) -> bool:  # noqa: ARG002
        """Say whether the work of `join` has vanished, as after a reboot.

        An engine that was killed forgets the endpoints of its containers without a ``Leave``. The SDK asks for each
        endpoint in a sandbox when the plugin starts, when an engine activates it, and when
        `program_external_connectivity` raises `Conflict`, which then runs once more; those that are gone are deleted.
        """
        return False

    def gw_alloc_check(self, options: OptionsT, request: NetworkOptions) -> SkipGateway:
        """Say for which IP versions a network of these options needs no gateway address (``GwAllocCheck``).

        `request` holds the other arguments of ``docker network create``, such as ``--internal``. Called before
        `create_network` by engines ≥ 28; overriding it sets the capability ``GwAllocChecker``.
        """
        raise NotImplementedError

    def allocate_network(self, request: AllocateNetwork) -> Mapping[str, str]:  # noqa: ARG002
        """Allocate more than `cluster_numbers` for a network (``AllocateNetwork``; on managers, `scope` global).

        `AllocateNetwork.options` has ``-o``, the `cluster_numbers`, and, when another manager begins to lead, the
        options that were allocated before: keep them. A repeated request is answered from memory. The network does not
        exist here yet, and need not ever.

        Returns:
            Options that the nodes get with ``CreateNetwork``, beside those of the request.
        """
        return {}

    def free_network(self, network_id: str) -> None:
        """Free the options that `allocate_network` gave (``FreeNetwork``); also undoes one that failed.

        `allocations` still has them.
        """

    def peer_joined(self, network: Network[OptionsT], peer: Node) -> None:
        """Let the network reach a node that joined the swarm (``DiscoverNew``); it is one of `peers`.

        Called for each network. It does for one node the work that `create_network` does for all `peers`, so the SDK
        does not call it again when the plugin starts. It does when a node is back that the gossip had lost: it missed
        the announcements of the meantime. Overriding it makes the ``ConnectivityScope`` global.
        """

    def peer_left(self, network: Network[OptionsT], peer: Node) -> None:
        """Forget a node that left the swarm (``DiscoverDelete``), two minutes ago; called for each network.

        Until then the gossip may only have lost it: a node that is cut off, or whose engine restarts, can be back.
        If the plugin is killed in it, `create_network` runs with the `peers` that are left.
        """


class IpamDriver(metaclass=_DriverType):
    """A Docker IPAM driver: gives out address pools and addresses.

    Calls for one pool come one after the other, calls for different pools in parallel; pools are requested and released
    one at a time. The engine repeats a request whose answer was lost, and it cannot be told from a new one: see
    `request_pool` and `request_address`.
    """

    requires_mac_address: bool = False
    """Whether `AddressRequest.mac_address` is wanted (``GetCapabilities``)."""

    requires_request_replay: bool = False
    """Whether the engine is to request pools and gateways again after its restart (``GetCapabilities``)."""

    local_address_space: ClassVar[str] = "LocalDefault"
    """Default address space of networks of local scope (``GetDefaultAddressSpaces``)."""

    global_address_space: ClassVar[str] = "GlobalDefault"
    """Default address space of networks of global scope (``GetDefaultAddressSpaces``)."""

    def open(self, folder: Path | None) -> None:
        """Begin, before the first call. `folder` is the plugin's own, to keep files in; None if it has none."""

    def close(self) -> None:
        """End, after the last call."""

    def engine_starts(self) -> None:
        """Learn that an engine has started (``GetCapabilities``), and asks again if `requires_request_replay`."""

    def engine_has(self, engine: str, pools: Sequence[UsedPool]) -> bool:  # noqa: ARG002
        """Learn which pools and addresses the networks of an engine have.

        If a driver overrides this, the SDK asks the engine in the background, beside calls: when the plugin or the
        engine starts, on SIGHUP, and after a pool was requested. So a driver finds addresses that were released while
        the plugin was down, and addresses that it gave out and the engine never heard of. A network or an endpoint that
        is being made is not listed yet.

        Args:
            engine: the engine's id.
            pools: those of the networks of this host that an IPAM plugin gives addresses to.

        Returns:
            Whether to learn it again in half a minute, since something is missing that may be on its way.
        """
        return False

    @abstractmethod
    def request_pool(self, request: PoolRequest) -> Pool:
        """Give out a pool (``RequestPool``).

        Where `PoolRequest.pool` is None, never the same pool twice: the engine holds on to a pool that overlaps one of
        its own and asks for another.
        """

    @abstractmethod
    def release_pool(self, pool_id: str) -> None:
        """Take the pool back (``ReleasePool``)."""

    @abstractmethod
    def request_address(self, request: AddressRequest) -> IPInterface:
        """Give out an address, with the prefix length of its pool (``RequestAddress``)."""

    @abstractmethod
    def release_address(self, address: AddressRef) -> None:
        """Take the address back (``ReleaseAddress``)."""
