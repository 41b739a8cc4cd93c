"""A DHCP client for many interfaces (RFC 2131): leases are obtained, kept and given back. It knows nothing of Docker.

The messages and their way onto the wire are pyroute2's. Its client is not used: it serves one interface, in the network
namespace that its event loop is in, with two sockets and four tasks for as long as the lease lasts; it cannot ask for
an address; and a message that it cannot read ends it. Here a socket lives for one exchange only. So an interface may
be moved to another namespace between two of them, and nothing of ours keeps a container's namespace alive.
"""

from __future__ import annotations

import asyncio
import enum
import fcntl
import logging
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from typing import Any, TypeVar

from pyroute2.dhcp.dhcp4msg import dhcp4msg
from pyroute2.dhcp.dhcp4socket import AsyncDHCP4Socket
from pyroute2.dhcp.enums.bootp import Flag
from pyroute2.dhcp.enums.bootp import MessageType as Operation
from pyroute2.dhcp.enums.dhcp import MessageType, Option
from pyroute2.dhcp.messages import SentDHCPMessage
from pyroute2.ext import bpf

from netplugin_dhcp.lease import Lease
from netplugin_dhcp.namespaces import interface_of, within
from netplugin_sdk import MacAddress

T = TypeVar("T")

_log = logging.getLogger("netplugin_dhcp")
logging.getLogger("pyroute2.dhcp").setLevel(logging.CRITICAL)  # a stranger's bad packet is no error of ours

_PARAMETERS = [
    Option.SUBNET_MASK,
    Option.CLASSLESS_STATIC_ROUTE,  # before the router (RFC 3442)
    Option.ROUTER,
    Option.LEASE_TIME,
    Option.RENEWAL_TIME,
    Option.REBINDING_TIME,
]

_ETH_P_IP = 0x0800  # linux/if_ether.h
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914  # linux/sockios.h
_IFF_UP, _IFF_RUNNING = 0x1, 0x40  # linux/if.h


@dataclass(frozen=True)
class Interface:
    """The interface with this MAC address, in the network namespace of this path; None is the plugin's own."""

    mac: MacAddress
    namespace: str | None = None


@dataclass(frozen=True)
class Waits:
    """How long is waited, in seconds."""

    exchange: float = 10.0
    """For an exchange about a lease that we have."""
    decision: float = 4.0
    """For a server to grant what it has offered, until others are asked too."""
    silence: float = 60.0
    """After an exchange without an answer, at least (RFC 2131, 4.4.5)."""
    missing_min: float = 1.0
    """For an interface that was not there, until it is looked for again: at first."""
    missing_max: float = 60.0
    """The same, at most."""
    clock: float = 60.0
    """Between looks at the clock."""
    carrier: float = 1.0
    """For the carrier of an interface that is set up."""


class Refused(Exception):
    """The server says no (DHCPNAK), and perhaps why."""


class Leases:
    """Leases of any number of interfaces, all in one thread with an event loop, which the first use starts."""

    def __init__(self) -> None:
        self.waits = Waits()
        """For what begins from now on."""
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._kept: dict[str, tuple[_Kept, asyncio.Task[None]]] = {}  # of the loop's thread alone

    def obtain(
        self, mac: MacAddress, offered: Callable[[Lease], object], *, wanted: IPv4Address | None = None, timeout: float
    ) -> Lease:
        """A lease for the interface with this MAC address, here, which is set up for it. `wanted` is only asked for.

        `offered` is told of what is about to be accepted, in the loop's thread: to write it down, so that it can be
        given back whatever happens, or to raise something, and have none.

        Raises:
            TimeoutError: no server grants one within `timeout` seconds.
            Refused: one has, and takes it back, again and again.
            OSError: there is no such interface, or it cannot be used.
        """
        _set_up(mac, self.waits.carrier)
        return self._do(_obtain(Interface(mac), offered, wanted, timeout, self.waits.decision))

    def keep(
        self,
        name: str,
        lease: Lease,
        where: Callable[[], Interface],
        granted: Callable[[Lease], object],
        *,
        host_name: str = "",
        confirm: bool = False,
    ) -> None:
        """Have more time granted for a lease whenever it is due, under this name; nothing if it is kept already.

        Before each exchange `where` is asked for the interface; after each that succeeded `granted` is told the new
        lease, in the loop's thread. Its address never changes: if it is lost, the log says so, and it is tried for
        again. `confirm` asks at once whether it is still ours (INIT-REBOOT): we may have been away for long.
        """
        kept = _Kept(name, lease, where, granted, self.waits, host_name=host_name, confirm=confirm)
        self._do(self._keep(name, kept))

    async def _keep(self, name: str, kept: _Kept) -> None:
        if name not in self._kept:
            self._kept[name] = kept, asyncio.create_task(kept.run())

    def rename(self, name: str, host_name: str) -> None:
        """Tell the server this host name, now and from now on."""
        self._do(self._rename(name, host_name))

    async def _rename(self, name: str, host_name: str) -> None:
        if name in self._kept:
            self._kept[name][0].rename(host_name)

    def drop(self, name: str) -> None:
        """Keep the lease of this name no more. When this returns nothing of it is under way."""
        self._do(self._drop(name))

    async def _drop(self, name: str) -> None:
        if name in self._kept:
            _, task = self._kept.pop(name)
            task.cancel()
            await asyncio.wait([task])

    def release(self, mac: MacAddress, lease: Lease) -> None:
        """Give the lease back, by the interface with this MAC address, here, which is set up for it.

        Nobody answers that. Raises OSError if it cannot be sent.
        """
        _set_up(mac, self.waits.carrier)
        self._do(_release(Interface(mac), lease))

    def close(self) -> None:
        """End the thread. Leases stay what they are; the next use starts again, and keeps none."""
        with self._guard:
            loop, thread, self._loop = self._loop, self._thread, None
        if loop is not None and thread is not None:
            for name in tuple(self._kept):
                asyncio.run_coroutine_threadsafe(self._drop(name), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def _do(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._guard:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="leases", daemon=True)
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result()


class _Stage(enum.Enum):
    """The question, and the servers that it goes to; the text completes a sentence for the log."""

    CONFIRM = "no DHCP server confirms it"
    """Any server that knows whether the lease is still valid, after an absence."""
    RENEW = "the DHCP server does not answer"
    """The server that granted it."""
    REBIND = "no DHCP server prolongs it"
    """Any server."""
    REGAIN = "it has expired, and no DHCP server grants it again; it stays in use, and may become another host's"
    """Any server, as a newcomer that wants this address."""


class _Kept:
    """A lease that is kept. Its methods run in the loop's thread."""

    def __init__(
        self,
        name: str,
        lease: Lease,
        where: Callable[[], Interface],
        granted: Callable[[Lease], object],
        waits: Waits,
        *,
        host_name: str,
        confirm: bool,
    ) -> None:
        self._name, self._lease, self._where, self._granted, self._host_name = name, lease, where, granted, host_name
        self._waits = waits
        self._confirm, self._lost = confirm, False
        self._at_once = asyncio.Event()
        self._due = time.time() if confirm else lease.renewal
        self._absence = waits.missing_min
        self._trouble = ""

    def rename(self, host_name: str) -> None:
        """Ask at once, with this host name."""
        self._host_name = host_name
        self._at_once.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self._wait()
            try:
                await self._prolong()
            except Exception:
                _log.exception("lease of %s for %s: cannot be kept", self._lease.address, self._name)
                self._due = time.time() + self._waits.silence

    async def _wait(self) -> None:
        """Until it is due by the clock on the wall, which goes on while the host sleeps; the loop's own does not."""
        while not self._at_once.is_set() and (left := self._due - time.time()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._at_once.wait(), min(left, self._waits.clock))
        self._at_once.clear()

    async def _prolong(self) -> None:
        now = time.time()
        stage, end = self._stage(now)
        try:
            with closing(_Socket(self._where())) as asking:
                async with asyncio.timeout(min(max(end - now, 1.0), self._waits.exchange)):
                    lease = await self._ask(asking, stage)
        except TimeoutError:
            self._complain(stage.value)
            self._confirm = False  # the lease is ours for its time, though nobody says so
            now = time.time()
            self._due = min(now + max((end - now) / 2, self._waits.silence), max(end, now + 1.0))
        except Refused as no:
            self._complain(f"the DHCP server refuses it{no}; it stays in use, and may become another host's")
            self._due = time.time() + (self._waits.silence if self._lost else 1.0)
            self._lost = True
        except OSError as error:
            # The engine may be moving it just now.
            self._due = time.time() + self._absence
            self._absence = min(2 * self._absence, self._waits.missing_max)
            if self._absence == self._waits.missing_max:
                self._complain(f"it cannot be prolonged: {error}")
        else:
            self._accept(lease)

    def _stage(self, now: float) -> tuple[_Stage, float]:
        """And until when it lasts."""
        lease = self._lease
        if self._lost or now >= lease.expiry:
            return _Stage.REGAIN, now + self._waits.silence
        if self._confirm:
            return _Stage.CONFIRM, max(lease.renewal, now + self._waits.exchange)
        if now < lease.rebinding:
            return _Stage.RENEW, lease.rebinding
        return _Stage.REBIND, lease.expiry

    async def _ask(self, asking: _Socket, stage: _Stage) -> Lease:
        address, name = self._lease.address.ip, self._host_name
        match stage:
            case _Stage.CONFIRM:
                return await asking.request(name, requested_ip=str(address))
            case _Stage.RENEW:
                return await asking.request(name, prolonged=self._lease, to_server=True)
            case _Stage.REBIND:
                return await asking.request(name, prolonged=self._lease)
            case _Stage.REGAIN:
                offer = await asking.discover(name, address)
                if offer.address.ip != address:
                    raise Refused(f" and offers {offer.address.ip}")
                return await asking.accept(name, offer)

    def _accept(self, lease: Lease) -> None:
        if lease.address.ip != self._lease.address.ip:
            raise ValueError(f"asked for {self._lease.address.ip}, the DHCP server granted {lease.address.ip}")
        if self._trouble:
            _log.info("lease of %s for %s: prolonged again", lease.address, self._name)
        self._confirm = self._lost = False
        self._trouble, self._absence = "", self._waits.missing_min
        self._lease, self._due = lease, max(lease.renewal, time.time() + 1.0)
        self._granted(lease)

    def _complain(self, trouble: str) -> None:
        """Once for each trouble."""
        if trouble != self._trouble:
            self._trouble = trouble
            _log.warning("lease of %s for %s: %s", self._lease.address, self._name, trouble)


async def _obtain(
    interface: Interface,
    offered: Callable[[Lease], object],
    wanted: IPv4Address | None,
    timeout: float,
    decision: float,
) -> Lease:
    refused: Refused | None = None
    with closing(_Socket(interface)) as asking:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    offer = await asking.discover("", wanted)
                    offered(offer)
                    try:
                        async with asyncio.timeout(decision):
                            return await asking.accept("", offer)
                    except TimeoutError:
                        _log.debug("%s has offered %s, and says no more", offer.server, offer.address)
                    except Refused as no:
                        refused = no
                        await asyncio.sleep(1.0)  # a server may have offered what another host has by now
        except TimeoutError:
            raise (refused or TimeoutError()) from None


async def _release(interface: Interface, lease: Lease) -> None:
    with closing(_Socket(interface)) as telling:
        options = {"message_type": MessageType.RELEASE, "server_id": str(lease.server)}
        await telling.put(telling.message(options, lease, to_server=True))


class _Socket(AsyncDHCP4Socket):  # type: ignore[misc]  # pyroute2 has no types
    """For one exchange, on an interface in any namespace. Raises OSError."""

    def __init__(self, interface: Interface) -> None:
        super().__init__("")  # which opens nothing: that is done where the interface is
        self.l2addr = str(interface.mac)
        within(interface.namespace, partial(self._open, interface.mac))

    def _open(self, mac: MacAddress) -> None:
        # Without a protocol nothing is received before it is bound, so nothing gets past the filter.
        socket.socket.__init__(self, socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            self.setblocking(False)
            program, self.fprog = bpf.compile(self.bpf)
            self.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
            self.bind((interface_of(mac), _ETH_P_IP))
        except BaseException:
            self.close()
            raise

    async def discover(self, host_name: str, wanted: IPv4Address | None) -> Lease:
        """The first offer that can be used."""
        options = {"message_type": MessageType.DISCOVER} | ({"requested_ip": str(wanted)} if wanted else {})
        return await self._exchange(self.message(_asking(options, host_name)), MessageType.OFFER)

    async def accept(self, host_name: str, offer: Lease) -> Lease:
        """Take an offer. Raises `Refused`."""
        return await self.request(host_name, requested_ip=str(offer.address.ip), server_id=str(offer.server))

    async def request(
        self, host_name: str, *, prolonged: Lease | None = None, to_server: bool = False, **options: str
    ) -> Lease:
        """Ask for a lease, or for more time for this one. Raises `Refused`."""
        asking = _asking({"message_type": MessageType.REQUEST, **options}, host_name)
        return await self._exchange(self.message(asking, prolonged, to_server=to_server), MessageType.ACK)

    def message(self, options: dict[str, Any], lease: Lease | None = None, *, to_server: bool = False) -> Any:
        """From a client with a lease, or without one; to the server that granted it, or to all."""
        options["client_id"] = {"type": 1, "key": self.l2addr}
        content = {"op": Operation.BOOTREQUEST, "chaddr": self.l2addr, "options": options}
        content["flags"] = Flag.BROADCAST if lease is None else Flag.UNICAST  # how it is to be answered
        if lease is None:
            return SentDHCPMessage(dhcp=dhcp4msg(content))
        address = str(lease.address.ip)
        content["ciaddr"] = address
        if not to_server:
            return SentDHCPMessage(dhcp=dhcp4msg(content), ip_src=address)
        return SentDHCPMessage(
            dhcp=dhcp4msg(content), ip_src=address, ip_dst=str(lease.server), eth_dst=str(lease.server_mac)
        )

    async def _exchange(self, message: Any, wanted: MessageType) -> Lease:
        """Send it, and again, until it is answered. Raises `Refused`."""
        began = time.time()
        message.dhcp["xid"] = xid = random.getrandbits(32)
        pause = 1.0
        while True:
            message.dhcp["secs"] = int(time.time() - began)
            await self.put(message)
            with suppress(TimeoutError):
                # Not the same for all containers of a host that starts.
                async with asyncio.timeout(pause * random.uniform(0.8, 1.2)):
                    return await self._answer(xid, wanted, began)
            pause = min(2 * pause, 8.0)

    async def _answer(self, xid: int, wanted: MessageType, began: float) -> Lease:
        while True:
            try:
                received = await self.get()
                answer, options = received.dhcp, received.dhcp["options"]
                if (answer["op"], answer["xid"], answer["chaddr"]) != (Operation.BOOTREPLY, xid, self.l2addr):
                    continue  # another's: most answers are sent to all
                if options["message_type"] == MessageType.NAK and wanted == MessageType.ACK:
                    reason = options.get("message")
                    raise Refused(f": {reason}" if reason else "")
                if options["message_type"] == wanted:
                    return Lease.granted(answer["yiaddr"], options, received.eth_src, began)
            except (OSError, Refused):
                raise
            except Exception as error:  # of what anybody may send, pyroute2 raises whatever it stumbles over
                _log.debug("a DHCP message that cannot be used: %r", error)
                await asyncio.sleep(0)


def _asking(options: dict[str, Any], host_name: str) -> dict[str, Any]:
    options["parameter_list"] = _PARAMETERS
    if host_name:
        options["host_name"] = host_name
    return options


def _set_up(mac: MacAddress, carrier: float) -> None:
    """And wait until its frames are carried on: earlier ones are lost. Raises OSError."""
    name = interface_of(mac).encode()
    until = time.monotonic() + carrier
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def flags() -> int:
            found = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, struct.pack("16sH22x", name, 0))
            return int(struct.unpack_from("16xH", found)[0])

        up = struct.pack("16sH22x", name, flags() | _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, up)
        while not flags() & _IFF_RUNNING and time.monotonic() < until:
            time.sleep(0.002)
        # This one waits for the lock under which the kernel tells of the carrier, so that a bridge has heard of it too.
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, up)
