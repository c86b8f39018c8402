"""The one address that other hosts are told."""

import socket

import pytest

from pipemoe.comm import address
from pipemoe.comm.address import own_address
from pipemoe.errors import ConfigError


class Probe:
    """A socket of a host whose default route goes by 10.1.2.3, and which has 10.9.8.7 too."""

    def __init__(self, *kind):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def bind(self, place):
        if place[0] not in ("10.1.2.3", "10.9.8.7"):
            raise OSError(99, "Cannot assign requested address")

    def connect(self, place):
        pass

    def getsockname(self):
        return "10.1.2.3", 1


@pytest.mark.parametrize(
    ("named", "wanted"),
    [("127.0.1.1", "10.1.2.3"), ("10.9.8.7", "10.9.8.7"), ("203.0.113.5", "10.1.2.3"), (None, "10.1.2.3")],
    ids=["Debian's loopback", "its own", "that of a translating gateway", "no name"],
)
def test_the_name_is_believed_if_the_host_has_that_address(monkeypatch, named, wanted):
    def by_name(name):
        if named is None:
            raise socket.gaierror(-2, "Name or service not known")
        return named

    monkeypatch.delenv("PIPEMOE_INTERFACE", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", by_name)
    monkeypatch.setattr(address.socket, "socket", Probe)
    assert own_address() == wanted


def test_an_interface_may_be_named(monkeypatch):
    monkeypatch.setenv("PIPEMOE_INTERFACE", "lo")
    assert own_address() == "127.0.0.1"


@pytest.mark.parametrize("name", ["nowhere0", "x" * 300, "br\u00fccke"])
def test_an_interface_that_is_not_there_is_an_error(monkeypatch, name):
    monkeypatch.setenv("PIPEMOE_INTERFACE", name)
    with pytest.raises(
        ConfigError, match=f"PIPEMOE_INTERFACE is '{name}', which has no IPv4 address on .*; it must be one of: .*lo"
    ):
        own_address()
