"""The one address at which other hosts reach this one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

from pipemoe.errors import ConfigError

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_LONGEST_NAME = 15  # of an interface


def own_address() -> str:
    """The first of these that exists: the address of the interface that PIPEMOE_INTERFACE names; the address of the
    host's own name, unless that is loopback (as on Debian) or belongs to another host; the address of the default
    route's interface.

    Raises ConfigError if the named interface does not exist or has no IPv4 address.
    """
    interface = os.environ.get("PIPEMOE_INTERFACE")
    if interface:
        return _address_of(interface)
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127.") and _is_here(address):
            return address
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only chooses a route
        return probe.getsockname()[0]
    return "127.0.0.1"


def _address_of(interface: str) -> str:
    name = os.fsencode(interface)
    try:
        if len(name) > _LONGEST_NAME or b"\0" in name:
            raise OSError("no such name is possible")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name))
    except OSError as error:
        there = ", ".join(name for _, name in socket.if_nameindex())
        raise ConfigError(
            f"PIPEMOE_INTERFACE is {interface!r}, which has no IPv4 address on {socket.gethostname()} ({error}); it "
            f"must be one of: {there}"
        ) from None
    return socket.inet_ntoa(found[20:24])


def _is_here(address: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
