"""The prober of a lab: one process beside the engine whose threads enter any network namespace.

Usage: ``agent.py SOCKET``. It answers one JSON line with one JSON line, on a unix socket:

* ``{"do": "serve", "where": NS, "name": NAME, "ports": [[KIND, PORT], …]}``: send each caller NAME and its address;
* ``{"do": "ask", "patience": S, "probes": [[NS, KIND, HOST, PORT], …]}``: all at once; for each ``[NAME, ADDRESS, ""]``
  as a server told it, or ``["", "", WHY]``;
* ``{"do": "bind", "probes": [[NS, KIND, HOST, PORT], …]}``: bind and close; for each "" or the error;
* ``{"do": "heard"}``: which server was asked from which address, as ``[NAME, ADDRESS]``, even if the answer was lost;
* ``{"do": "stop"}``: end all servers, forget their callers.

NS is a path (``/proc/PID/ns/net``), or "" for the engine's own. KIND is tcp, udp, sctp or ping. SCTP is one INIT chunk,
answered with an INIT ACK, over a raw socket: it needs no SCTP in the kernel, and netfilter takes it for an association.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import selectors
import socket
import socketserver
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CLONE_NEWNET = 0x40000000
SCTP = 132
SCTP_INIT, SCTP_INIT_ACK, SCTP_TEXT = 1, 2, 0x8000 | 37

libc = ctypes.CDLL(None, use_errno=True)


def enter(where: str) -> None:
    """Take this thread, and those that it starts, to a network namespace."""
    if where:
        descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(descriptor, CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {where}")
        finally:
            os.close(descriptor)


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


# ---------------------------------------------------------------------------------------------------------- servers

selector = selectors.DefaultSelector()
lock = threading.Lock()
heard: list[tuple[str, str]] = []


def serve(where: str, name: str, ports: list[tuple[str, int]]) -> None:
    enter(where)
    for kind, port in ports:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                listener, handle = SERVERS[kind](family, port)
            except OSError as error:
                raise OSError(f"{name} cannot serve {kind} {port} of {family.name}: {error}") from None
            listener.setblocking(False)
            with lock:
                selector.register(listener, selectors.EVENT_READ, (handle, name))


def tcp_server(family: socket.AddressFamily, port: int) -> tuple[socket.socket, Callable[[socket.socket, str], None]]:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("", port))
    listener.listen(64)
    return listener, tcp_answer


def tcp_answer(listener: socket.socket, name: str) -> None:
    caller, address = listener.accept()
    heard.append((name, address[0]))
    with caller:
        caller.sendall(f"{name} {address[0]}".encode())


def udp_server(family: socket.AddressFamily, port: int) -> tuple[socket.socket, Callable[[socket.socket, str], None]]:
    listener = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        listener.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    listener.bind(("", port))
    return listener, udp_answer


IP_PKTINFO = 8


def udp_answer(listener: socket.socket, name: str) -> None:
    # The answer comes from the address that was asked, as a server with several addresses has to do it.
    _, ancillary, _, address = listener.recvmsg(100, 1000)
    heard.append((name, address[0]))
    answers: list[tuple[int, int, bytes]] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            answers.append((level, kind, struct.pack("@i4s4x", 0, data[4:8])))
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            answers.append((level, kind, data[:16] + struct.pack("@i", 0)))
    listener.sendmsg([f"{name} {address[0]}".encode()], answers, 0, address)


def sctp_server(family: socket.AddressFamily, port: int) -> tuple[socket.socket, Callable[[socket.socket, str], None]]:
    listener = socket.socket(family, socket.SOCK_RAW, SCTP)

    def answer(listener: socket.socket, name: str) -> None:
        data, address = listener.recvfrom(4096)
        packet = sctp_payload(family, data)
        if packet is None or packet[:2] != (port, SCTP_INIT):
            return
        _, _, source, tag, _ = packet
        told = f"{name} {address[0]}".encode()
        reply = sctp_packet((port, source), SCTP_INIT_ACK, told, tag=tag)
        listener.sendto(reply, (address[0], 0, *address[2:]))

    return listener, answer


SERVERS = {"tcp": tcp_server, "udp": udp_server, "sctp": sctp_server}


def serve_all() -> None:
    while True:
        for key, _ in selector.select(0.5):
            handle, name = key.data
            try:
                handle(key.fileobj, name)
            except (OSError, ValueError) as error:
                print(f"{name}: {error}", flush=True)


def stop() -> None:
    with lock:
        for key in list(selector.get_map().values()):
            selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------- clients


def ask(where: str, kind: str, host: str, port: int, patience: float) -> tuple[str, str, str]:
    try:
        enter(where)
        told = CLIENTS[kind](host, port, patience)
    except TimeoutError:
        return "", "", "timed out"
    except OSError as error:
        return "", "", error.strerror or str(error)
    name, _, address = told.partition(" ")
    return (name, address, "") if name else ("", "", "closed")


def tcp_ask(host: str, port: int, patience: float) -> str:
    until = time.monotonic() + patience
    while True:
        with socket.socket(family_of(host), socket.SOCK_STREAM) as caller:
            caller.settimeout(min(patience, 1.0))
            try:
                caller.connect((host, port))
            except TimeoutError:
                if time.monotonic() >= until:
                    raise
                continue
            caller.settimeout(max(1.0, patience))
            told = b""
            while part := caller.recv(1000):
                told += part
            return told.decode()


def udp_ask(host: str, port: int, patience: float) -> str:
    with socket.socket(family_of(host), socket.SOCK_DGRAM) as caller:
        caller.connect((host, port))
        caller.settimeout(patience / 3)
        for _ in range(3):
            caller.send(b"?")
            try:
                return caller.recv(1000).decode()
            except TimeoutError:
                pass
    raise TimeoutError


def ping_ask(host: str, _: int, patience: float) -> str:
    family = family_of(host)
    six = family == socket.AF_INET6
    until = time.monotonic() + patience
    identifier = random.randrange(1, 65536)
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP) as caller:
        caller.connect((host, 0))
        for number in range(3):
            header = struct.pack("!BBHHH", 128 if six else 8, 0, 0, identifier, number)
            if not six:  # the kernel does it for ICMPv6
                total = sum(struct.unpack("!4H", header))
                header = struct.pack("!BBHHH", 8, 0, ~(total + (total >> 16)) & 0xFFFF, identifier, number)
            caller.send(header)
            again = until - patience * (2 - number) / 3
            while (left := again - time.monotonic()) > 0:
                caller.settimeout(left)
                try:
                    data = caller.recv(1000)
                except TimeoutError:
                    break
                data = data if six else data[(data[0] & 15) * 4 :]
                if data[0] == (129 if six else 0) and data[4:6] == header[4:6]:
                    return "pong"
    raise TimeoutError


def sctp_ask(host: str, port: int, patience: float) -> str:
    family = family_of(host)
    source, tag = random.randrange(20000, 60000), random.randrange(1, 1 << 32)
    with socket.socket(family, socket.SOCK_RAW, SCTP) as caller:
        caller.connect((host, 0))
        for _ in range(3):
            caller.send(sctp_packet((source, port), SCTP_INIT, initiate=tag))
            until = time.monotonic() + patience / 3
            while (left := until - time.monotonic()) > 0:
                caller.settimeout(left)
                try:
                    packet = sctp_payload(family, caller.recv(4096))
                except TimeoutError:
                    break
                if packet is not None and packet[:2] == (source, SCTP_INIT_ACK):
                    return packet[4].decode()
    raise TimeoutError


CLIENTS = {"tcp": tcp_ask, "udp": udp_ask, "ping": ping_ask, "sctp": sctp_ask}


def sctp_packet(ports: tuple[int, int], kind: int, text: bytes = b"", *, tag: int = 0, initiate: int = 7) -> bytes:
    """An SCTP packet (RFC 9260) of one INIT or INIT ACK chunk, with a parameter that holds a text."""
    padded = text + bytes(-len(text) % 4)
    parameter = struct.pack("!HH", SCTP_TEXT, 4 + len(text)) + padded if text else b""
    body = struct.pack("!IIHHI", initiate, 65535, 1, 1, 1) + parameter
    chunk = struct.pack("!BBH", kind, 0, 4 + len(body) - (len(padded) - len(text))) + body
    head = struct.pack("!HHI", *ports, tag)
    return head + struct.pack("<I", crc32c(head + bytes(4) + chunk)) + chunk


def sctp_payload(family: int, data: bytes) -> tuple[int, int, int, int, bytes] | None:
    """Destination port, kind of chunk, source port, initiate tag and text of a packet that a raw socket gave."""
    packet = data if family == socket.AF_INET6 else data[(data[0] & 15) * 4 :]
    if len(packet) < 32 or packet[12] not in (SCTP_INIT, SCTP_INIT_ACK):
        return None
    source, destination = struct.unpack("!HH", packet[:4])
    (tag,) = struct.unpack("!I", packet[16:20])
    text = b""
    if len(packet) >= 36:
        (length,) = struct.unpack("!H", packet[34:36])
        text = packet[36 : 32 + length]
    return destination, packet[12], source, tag, text


def crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 & -(value & 1))
    return value ^ 0xFFFFFFFF


def try_to_bind(where: str, kind: str, host: str, port: int) -> str:
    try:
        enter(where)
        with socket.socket(family_of(host), socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as bound:
            if kind == "tcp":
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
            if kind == "tcp":
                bound.listen()
    except OSError as error:
        return error.strerror or str(error)
    return ""


# --------------------------------------------------------------------------------------------------------- requests


def all_at_once(function: Callable[..., Any], calls: list[tuple[Any, ...]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def call(number: int) -> None:
        results[number] = function(*calls[number])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def answer(request: dict[str, Any]) -> Any:
    match request["do"]:
        case "serve":
            serve(request["where"], request["name"], request["ports"])
        case "ask":
            return all_at_once(ask, [(*probe, request["patience"]) for probe in request["probes"]])
        case "bind":
            return all_at_once(try_to_bind, [tuple(probe) for probe in request["probes"]])
        case "heard":
            return heard
        case "stop":
            heard.clear()
            stop()
    return None


class Handler(socketserver.StreamRequestHandler):
    """One request; its thread may enter a namespace, since it ends with it."""

    def handle(self) -> None:
        try:
            reply = {"ok": answer(json.loads(self.rfile.readline()))}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        self.wfile.write(json.dumps(reply).encode() + b"\n")


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    Path(sys.argv[1]).unlink(missing_ok=True)
    threading.Thread(target=serve_all, daemon=True).start()
    Server(sys.argv[1], Handler).serve_forever()
