"""Ports that are held for others to listen on."""

from __future__ import annotations

import socket

import pytest

from services.local.errors import PortTaken
from services.local.ports import HeldPort
from tests.unit.local.fake_service import listen

HOST = "127.0.0.1"


def test_a_server_listens_on_a_held_port_again_and_again() -> None:
    with HeldPort(HOST) as port:
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, port.number))
            with listen(HOST, port.number) as server, socket.create_connection((HOST, port.number)):
                accepted, _ = server.accept()
                accepted.close()


def test_servers_share_a_held_port_when_they_want_to() -> None:
    with HeldPort(HOST) as port, listen(HOST, port.number, shared=True):
        with listen(HOST, port.number, shared=True):
            pass
        with pytest.raises(OSError, match="in use"):
            listen(HOST, port.number)


def test_a_held_port_is_nobodys_free_port() -> None:
    """The range of free ports is used up until the kernel would have to give the held one."""
    with HeldPort(HOST) as port:
        taken = set()
        sockets = []
        for _ in range(2000):
            sockets.append(socket.socket())
            sockets[-1].bind((HOST, 0))
            taken.add(sockets[-1].getsockname()[1])
        for item in sockets:
            item.close()
        assert port.number not in taken
        with pytest.raises(OSError, match="in use"), socket.socket() as plain:
            plain.bind((HOST, port.number))


@pytest.mark.parametrize("shared", [False, True])
def test_a_port_that_somebody_listens_on_is_refused(shared: bool) -> None:
    """Also when they would share it (R19)."""
    with HeldPort(HOST) as port:
        number = port.number
    with (
        listen(HOST, number, shared=shared),
        pytest.raises(PortTaken, match=f"{HOST}:{number}: another process listens"),
    ):
        HeldPort(HOST, number)


def test_a_port_that_somebody_holds_is_refused() -> None:
    with HeldPort(HOST) as port, pytest.raises(PortTaken, match="another process listens there"):
        HeldPort(HOST, port.number)
    HeldPort(HOST, port.number).close()


def test_a_port_is_free_again_right_after_its_connections_ended() -> None:
    with HeldPort(HOST) as port:
        server = listen(HOST, port.number)
        with socket.create_connection((HOST, port.number)):
            accepted, _ = server.accept()
            accepted.close()  # the server's end closes first and goes to TIME_WAIT
        server.close()
    HeldPort(HOST, port.number).close()


@pytest.mark.parametrize(("host", "number"), [("192.0.2.1", 0), ("no.such.host.invalid", 0), (HOST, 65536)])
def test_a_place_that_is_not_ours_is_refused(host: str, number: int) -> None:
    with pytest.raises(PortTaken, match=f"cannot use {host}:{number}"):
        HeldPort(host, number)
