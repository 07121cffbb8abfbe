"""Hosts as configurations, URLs and sockets write them."""

import socket
import ssl

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 (compared, not bound)
"""Hosts to listen on that are no destination."""
WITHOUT_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Knows no certificates, so nothing can be asked over TLS by it. For questions to a pool on this machine: httpx would read all certificates for
each of them, which takes longer than the answer."""


def bare(host: str) -> str:
    """A host without what only a URL needs.

    >>> bare("[::1]"), bare(" localhost ")
    ('::1', 'localhost')
    """
    return host.strip().removeprefix("[").removesuffix("]")


def authority(host: str, port: int) -> str:
    """``host:port`` as URLs write it.

    >>> authority("::1", 8000), authority("10.0.0.5", 8000)
    ('[::1]:8000', '10.0.0.5:8000')
    """
    return f"{f'[{host}]' if ':' in host else host}:{port}"


def destination(host: str) -> str:
    """Where a client on this machine reaches what listens on ``host``.

    >>> destination("0.0.0.0"), destination("::"), destination("10.0.0.5")
    ('127.0.0.1', '::1', '10.0.0.5')
    """
    if host not in EVERYWHERE:
        return host
    return "::1" if ":" in host else LOOPBACK


def ipv4(host: str) -> str:
    """The host that Ray Serve listens on for ``host``. Serve's replicas cannot have one of IPv6 while Ray itself is on 127.0.0.1; HAProxy can, in
    front of them (`cluster.pool.haproxy`).

    >>> ipv4("::1"), ipv4("::"), ipv4("10.0.0.5")
    ('127.0.0.1', '0.0.0.0', '10.0.0.5')
    """
    if ":" not in host:
        return host
    return "0.0.0.0" if host == "::" else LOOPBACK  # noqa: S104 (as the user asked)


def family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
