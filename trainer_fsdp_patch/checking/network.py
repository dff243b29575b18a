"""Whether ranks on this machine can reach each other, asked in a second, before they would wait for minutes."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading

from trainer_fsdp_patch.checking.errors import CheckError

LOOPBACK = "127.0.0.1"
INTERFACE = "GLOO_SOCKET_IFNAME"
"""Variable of gloo's: which interfaces it takes, separated by commas."""

PATIENCE = 1.0
"""Seconds in which an address of this machine has to answer."""

_SIOCGIFADDR = 0x8915
"""Linux's request for the address of an interface, which Python does not name."""


def refuse_deaf_loopback() -> None:
    """Refuse a machine whose 127.0.0.1 does not answer, where all ranks meet.

    Raises:
        CheckError: saying what the system said.
    """
    _refuse_deaf(LOOPBACK, "check", "Bring it up with `ip link set lo up`, or let the firewall pass it")


def refuse_deaf_gloo() -> None:
    """Refuse an address that gloo would take and that does not answer. Ranks on the CPU talk through gloo.

    gloo takes the interfaces that `GLOO_SOCKET_IFNAME` names, else the first address of the host's name that is this
    machine's, else the loopback.

    Raises:
        CheckError: an interface does not exist, or an address does not answer.
    """
    asked = [name.strip() for name in os.environ.get(INTERFACE, "").split(",") if name.strip()]
    known = [name for _, name in socket.if_nameindex()]
    for name in asked:
        if name not in known:
            found = f"there is no interface '{name}'"
            raise CheckError(INTERFACE, found, "Ranks could not meet", f"Name one of {', '.join(known)}")
        address = _address_of(name)
        if address:
            _refuse_deaf(address, f"{INTERFACE}={name}", "Name another interface")
    if asked:
        return
    host = socket.gethostname()
    for address in _addresses(host):
        if _is_here(address):
            _refuse_deaf(address, f"the host's name, {host}", f"Set {INTERFACE}=lo, or mend the name in /etc/hosts")
            return


def _refuse_deaf(address: str, subject: str, remedy: str) -> None:
    try:
        _echo(address)
    except OSError as error:
        found = f"{address} does not answer: {error.strerror or error}"
        raise CheckError(subject, found, "Ranks could not meet, and nothing was trained", remedy) from error


def _echo(address: str) -> None:
    """Listen at an address, connect to it, and pass a byte both ways."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket(family))
        server.settimeout(PATIENCE)
        server.bind((address, 0))
        server.listen(1)
        client = stack.enter_context(socket.create_connection(server.getsockname()[:2], timeout=PATIENCE))
        answer = stack.enter_context(server.accept()[0])
        answer.settimeout(PATIENCE)
        for one, other in ((client, answer), (answer, client)):
            one.sendall(b"?")
            if other.recv(1) != b"?":
                raise ConnectionError("what was sent did not arrive")


def _address_of(interface: str) -> str:
    """IPv4 address of an interface, or "" where it has none or the system cannot be asked."""
    if sys.platform != "linux":
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, contextlib.suppress(OSError):
        answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return ""


def _addresses(host: str) -> list[str]:
    """What a name resolves to, in order; nothing where the resolver is slow, for gloo does without it then."""
    found: list[str] = []

    def ask() -> None:
        with contextlib.suppress(OSError):
            found.extend(str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))

    # No timeout reaches the resolver, and a thread of this kind keeps no program from ending.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return list(found)


def _is_here(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as bound, contextlib.suppress(OSError):
        bound.bind((address, 0))
        return True
    return False
