"""LISTEN_FDS is read strictly: a listening TCP socket for us, or an error that says why it can't be used."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from llamesh.config.settings import Settings
from llamesh.service import BadHandover, Passed, take_sockets

Pass = Callable[..., tuple[dict[str, str], int]]


@pytest.fixture
def pass_on() -> Iterator[Pass]:
    """Puts descriptors side by side, as they are after an exec: the environment, and the first number."""
    with ExitStack() as stack:

        def pass_on(*sources: int, names: str | None = None, **more: str) -> tuple[dict[str, str], int]:
            first = 200
            for number, source in enumerate(sources, first):
                os.dup2(source, number)
                stack.callback(_close, number)
            environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sources)), **more}
            if names is not None:
                environ["LISTEN_FDNAMES"] = names
            return environ, first

        yield pass_on


def _close(number: int) -> None:
    # Whoever took it over may have closed it.
    try:
        os.close(number)
    except OSError:
        return


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def forget(passed: Passed) -> None:
    """Leave the descriptors to the fixture."""
    for sock in (*passed.api, *passed.peers):
        sock.detach()


def at(sock: socket.socket, **cluster: object) -> Settings:
    """A configuration whose listen_addr is this socket's."""
    host, port = sock.getsockname()[:2]
    return Settings.model_validate({"listen_addr": f"{host}:{port}", "cluster": cluster})


def test_without_the_variables_nothing_was_passed() -> None:
    assert take_sockets({}, Settings()) == Passed()


def test_a_listening_socket_is_taken_over(pass_on: Pass, listening: socket.socket) -> None:
    environ, first = pass_on(listening.fileno(), names="llamesh.socket", PATH="/bin")
    passed = take_sockets(environ, at(listening), first)
    [sock] = passed.api
    assert passed.peers == []
    assert sock.getsockname() == listening.getsockname()
    assert sock.fileno() == first
    assert not sock.get_inheritable()
    assert not sock.getblocking()
    # No child takes them for its own.
    assert environ == {"PATH": "/bin"}
    forget(passed)


def test_the_name_tells_the_sockets_of_peers(pass_on: Pass, listening: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        environ, first = pass_on(listening.fileno(), other.fileno(), names="api:peers")
        host, port = other.getsockname()
        settings = at(listening, enabled=True, listen_addr=f"{host}:{port}")
        passed = take_sockets(environ, settings, first)
        assert [sock.getsockname() for sock in passed.api] == [listening.getsockname()]
        assert [sock.getsockname() for sock in passed.peers] == [other.getsockname()]
        forget(passed)


def test_without_names_all_are_for_clients(pass_on: Pass, listening: socket.socket) -> None:
    environ, first = pass_on(listening.fileno(), listening.fileno())
    passed = take_sockets(environ, at(listening), first)
    assert (len(passed.api), passed.peers) == (2, [])
    forget(passed)


@pytest.mark.parametrize("pid", ["1", str(os.getpid() + 1)], ids=["init", "another"])
def test_what_was_meant_for_another_process_is_left_alone(
    pass_on: Pass, listening: socket.socket, pid: str
) -> None:
    environ, first = pass_on(listening.fileno(), names="api", LISTEN_PID=pid)
    assert take_sockets(environ, Settings(), first) == Passed()
    assert environ == {}
    os.fstat(first)  # still open


@pytest.mark.parametrize("name", ["LISTEN_PID", "LISTEN_FDS"])
@pytest.mark.parametrize(
    "value", ["", "-1", "+1", " 1", "1 ", "01", "1_0", "0x1", "1.0", "one", "٣", "9" * 30]
)
def test_a_number_is_plain_digits_or_an_error(name: str, value: str) -> None:
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", name: value}
    with pytest.raises(BadHandover, match=name):
        take_sockets(environ, Settings())


def test_there_is_a_bound_to_what_is_taken() -> None:
    with pytest.raises(BadHandover, match="0 to 64"):
        take_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "65"}, Settings())


def test_names_must_be_as_many_as_sockets(pass_on: Pass, listening: socket.socket) -> None:
    environ, first = pass_on(listening.fileno(), names="api:peers")
    with pytest.raises(BadHandover, match="says 1, but LISTEN_FDNAMES has 2"):
        take_sockets(environ, Settings(), first)


def test_a_descriptor_that_isnt_open(pass_on: Pass) -> None:
    environ, first = pass_on(LISTEN_FDS="1")
    with pytest.raises(BadHandover, match=f"descriptor {first} was passed.*no socket"):
        take_sockets(environ, Settings(), first)


def test_a_file(pass_on: Pass, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        environ, first = pass_on(file.fileno(), names="api")
        with pytest.raises(BadHandover, match=r"\('api'\).*no socket"):
            take_sockets(environ, Settings(), first)


def test_a_unix_socket(pass_on: Pass, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.listen()
        environ, first = pass_on(sock.fileno())
        with pytest.raises(BadHandover, match=r"AF_UNIX.*ListenStream=ADDRESS:PORT"):
            take_sockets(environ, Settings(), first)


def test_a_datagram_socket(pass_on: Pass) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        environ, first = pass_on(sock.fileno())
        with pytest.raises(BadHandover, match="not a TCP socket"):
            take_sockets(environ, Settings(), first)


def test_one_connection(pass_on: Pass, listening: socket.socket) -> None:
    with socket.create_connection(listening.getsockname()) as client:
        environ, first = pass_on(client.fileno())
        with pytest.raises(BadHandover, match="Accept=no"):
            take_sockets(environ, Settings(), first)


def test_both_families_at_once(pass_on: Pass) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this system has no sockets for both families")
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        environ, first = pass_on(sock.fileno())
        with pytest.raises(BadHandover, match="BindIPv6Only=ipv6-only"):
            take_sockets(environ, Settings(), first)


def test_another_address_than_configured_is_said(
    pass_on: Pass, listening: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    environ, first = pass_on(listening.fileno())
    forget(take_sockets(environ, Settings.model_validate({"listen_addr": "127.0.0.1:1"}), first))
    said = capsys.readouterr().err
    assert "the service manager's socket is used" in said
    assert "127.0.0.1:1" in said
    assert str(listening.getsockname()[1]) in said


def test_the_configured_address_needs_no_word(
    pass_on: Pass, listening: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    environ, first = pass_on(listening.fileno())
    forget(take_sockets(environ, at(listening), first))
    settings = Settings.model_validate({"listen_addr": f"localhost:{listening.getsockname()[1]}"})
    environ, first = pass_on(listening.fileno())
    forget(take_sockets(environ, settings, first))
    assert capsys.readouterr().err == ""


def test_a_socket_for_peers_without_a_mesh_is_closed_and_said(
    pass_on: Pass, listening: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    environ, first = pass_on(listening.fileno(), names="peers")
    assert take_sockets(environ, Settings(), first) == Passed()
    assert "cluster.enabled is off" in capsys.readouterr().err
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)


def test_a_socket_for_peers_needs_its_address_in_the_file(pass_on: Pass, listening: socket.socket) -> None:
    environ, first = pass_on(listening.fileno(), names="peers")
    with pytest.raises(BadHandover, match=r"cluster\.listen_addr isn't set"):
        take_sockets(environ, Settings.model_validate({"cluster": {"enabled": True}}), first)
