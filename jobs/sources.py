"""Reads a job's files. A source is a path, a URL, ``upload:<sha256>`` (what `PUT /admin/uploads` stored), or ``sample:tide`` (a data set that
ships with Springtide).

A job from a shell in the pool reads whatever the pool can read. A job that came over HTTP reads less, because its sender may hold nothing but
the gateway's key. It reads uploads, object-store URLs under ``training.data_prefixes``, and public web addresses.
Example: ``http://169.254.169.254/…`` is refused. So are a public name that resolves to that address, and a redirect that leads there.
"""

import gzip
import hashlib
import io
import ipaddress
import os
import socket
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from cluster.config import Config, Training
from cluster.errors import BodyTooLarge, DataError
from cluster.jobspec import ORIGIN
from cluster.machine import expanded
from cluster.redact import redact, redact_source
from cluster.store.objects import Store
from cluster.types import check_name

TIMEOUT_S = 60
REDIRECTS = 5
UNICAST = ipaddress.IPv6Network("2000::/3")
"""All public addresses of IPv6. Outside: ``::127.0.0.1`` (IPv4-compatible), site-local ones, and what nobody was given."""
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""The last 32 bits are an IPv4 address."""
TUNNELS = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))
"""Teredo and 6to4: an IPv4 address is within."""
UPLOAD, SAMPLE = "upload:", "sample:"
GZIP = b"\x1f\x8b"
COMPRESSED = {b"(\xb5/\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\x03\x04": "zip"}
"""How files begin that are compressed in a way which is not read here."""

Fetch = Callable[[str], bytes]


class Denied(Exception):
    """What a job that came over HTTP may not read, and what it may."""


@dataclass(frozen=True)
class Sources:
    training: Training = field(default_factory=Training)
    store: Store | None = None
    remote: bool = False
    """Whether the job came over HTTP."""

    def fetch(self, source: str) -> bytes:
        """The bytes of a source, inflated where it is gzip. Raises `DataError` with the reason, without the secrets of any URL."""
        try:
            return inflated(self._fetch(source), self.training.max_data_bytes)
        except Denied as error:
            raise DataError(f"A job that came over HTTP may not read {title(source)}: {error}.", ALLOWED) from error
        except (OSError, httpx.HTTPError, httpx.InvalidURL, BaseError, ValueError) as error:
            raise DataError(
                f"{title(source)} cannot be read: {_words(error, source)}.",
                "Check the path or URL, and that this machine may read it.",
            ) from error

    def _fetch(self, source: str) -> bytes:
        scheme = urlsplit(source).scheme if "://" in source else ""
        if source.startswith(UPLOAD):
            return self._uploaded(source)
        if source.startswith(SAMPLE):
            return sample(source.removeprefix(SAMPLE))
        if scheme in ("http", "https"):
            return self._public(source) if self.remote else self._web(source)
        if scheme in ("", "file"):
            if self.remote:
                raise Denied("it is a path on a machine of the pool")
            return expanded(unquote(urlsplit(source).path) if scheme else source).read_bytes()
        if self.remote and not any(under(source, prefix) for prefix in self.training.data_prefixes):
            raise Denied("no prefix in training.data_prefixes fits")
        return self._object(source)

    def _uploaded(self, source: str) -> bytes:
        digest = source.removeprefix(UPLOAD).partition("#")[0]
        if self.store is None or len(digest) != 64 or not all(letter in "0123456789abcdef" for letter in digest):
            raise ValueError("an upload is written upload:<sha256>")
        self._check_size(self.store.size(f"uploads/{digest}"))
        raw = self.store.get(f"uploads/{digest}")
        if raw is None or hashlib.sha256(raw).hexdigest() != digest:
            raise ValueError("the store has no such upload" if raw is None else "the store's copy is damaged; send it again")
        return raw

    def _object(self, source: str) -> bytes:
        folder, _, name = source.rpartition("/")
        found = obstore.get(from_url(folder), name)
        self._check_size(int(found.meta["size"]))
        return bytes(found.bytes())

    def _web(self, url: str) -> bytes:
        with through_proxies() as client, client.stream("GET", url) as response:
            return self._body(response)

    def _public(self, url: str) -> bytes:
        """Fetch over HTTP. For every hop this resolves the name, checks the address, and connects to that address: a moment later the name may
        resolve to another one."""
        at = httpx.URL(url)
        with httpx.Client(trust_env=False, timeout=TIMEOUT_S) as client:  # a proxy would resolve the name once more
            for _ in range(REDIRECTS + 1):
                with self._asked(client, at) as response:
                    if not response.has_redirect_location:
                        return self._body(response)
                    at = at.join(response.headers["location"])
        raise ValueError(f"more than {REDIRECTS} redirects")

    @contextmanager
    def _asked(self, client: httpx.Client, at: httpx.URL) -> Iterator[httpx.Response]:
        if at.scheme not in ("http", "https"):
            raise Denied(f"it leads to a {at.scheme} URL")
        address = public_address(at.host, at.port or (443 if at.scheme == "https" else 80))
        headers, secure = {"Host": at.netloc.decode("ascii")}, {"sni_hostname": at.host}
        with client.stream("GET", at.copy_with(host=address), headers=headers, extensions=secure) as response:
            yield response

    def _body(self, response: httpx.Response) -> bytes:
        response.raise_for_status()
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            self._check_size(len(body))
        return bytes(body)

    def _check_size(self, size_bytes: int | None) -> None:
        check_size(size_bytes or 0, self.training.max_data_bytes)


def check_size(size_bytes: int, limit_bytes: int) -> None:
    if size_bytes > limit_bytes:
        raise BodyTooLarge(f"The file is larger than training.max_data_bytes, {limit_bytes}.", "Split it, or raise the limit.")


def inflated(raw: bytes, limit_bytes: int) -> bytes:
    """What is within a gzip file; other bytes as they are. Raises `ValueError` for what is damaged, or compressed in another way.

    >>> inflated(gzip.compress(b"text") + gzip.compress(b", and more"), 1000), inflated(b"text", 1000)
    (b'text, and more', b'text')
    """
    if other := next((name for magic, name in COMPRESSED.items() if raw.startswith(magic)), None):
        raise ValueError(f"it is a {other} file; decompress it, or compress it with gzip")
    if not raw.startswith(GZIP):
        return raw
    try:
        whole = gzip.GzipFile(fileobj=io.BytesIO(raw)).read(limit_bytes + 1)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"it is a damaged gzip file: {error}") from error
    check_size(len(whole), limit_bytes)
    return whole


ALLOWED = "Upload the file (PUT /admin/uploads), or name a public http(s) URL or a URL under training.data_prefixes."


def through_proxies() -> httpx.Client:
    """A client that goes through the proxies of the environment. Raises `ValueError` where they cannot be used."""
    try:
        return httpx.Client(follow_redirects=True, timeout=TIMEOUT_S)
    except (
        ImportError,
        ValueError,
        httpx.InvalidURL,
    ) as error:  # SOCKS needs a package; a scheme or an exception that httpx cannot read
        names = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY"
        raise ValueError(f"the environment's proxies cannot be used ({error}); correct or unset {names}") from error


def of(config: Config) -> Fetch:
    """How this job reads what its caller named."""
    return Sources(config.training, Store(config.store), os.environ.get(ORIGIN) == "http").fetch


def own(config: Config) -> Fetch:
    """How a job reads what the configuration names, whoever started it."""
    return Sources(config.training, Store(config.store)).fetch


local: Fetch = Sources().fetch
"""For a command in a shell."""


def sample(name: str) -> bytes:
    """
    >>> sample("tide").startswith(b'{"')
    True
    """
    return (resources.files("jobs") / "seedling" / f"{check_name(name)}.jsonl").read_bytes()


def title(source: str) -> str:
    """What a message calls a source.

    >>> title("upload:0123456789abcdef#tide.jsonl"), title("upload:0123456789abcdef"), title("s3://bucket/x?secret")
    ('tide.jsonl', 'upload:0123456789ab', 's3://bucket/x')
    """
    if not source.startswith(UPLOAD):
        return redact_source(source)
    digest, _, name = source.partition("#")
    return name or digest[: len(UPLOAD) + 12]


def _words(error: Exception, source: str) -> str:
    """What an error says, without the secrets of any URL in it: httpx quotes the one that it asked last, which a redirect may have named."""
    words = str(error)
    for url in (source, str(error.response.url) if isinstance(error, httpx.HTTPStatusError) else source):
        words = words.replace(url, redact_source(url))  # whole, whatever is in it: a quote would end it for `redact`
    return redact(words)


def under(source: str, prefix: str) -> bool:
    """
    >>> under("s3://b/data/x", "s3://b/data"), under("s3://b/database/x", "s3://b/data"), under("s3://b/data/../x", "s3://b/data")
    (True, False, False)
    """
    return source.startswith(f"{prefix.rstrip('/')}/") and ".." not in unquote(source).split("/")


def public_address(host: str, port: int) -> str:
    """An address of ``host``. Raises `Denied` where any of them is not public: private, loopback, link-local, multicast, reserved, or an
    IPv6 address that a translator or a tunnel takes to such an IPv4 address."""
    found: Iterable[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]
    for address in addresses:
        if not _is_public(address):
            raise Denied(f"{host} is {address}, which is no public address")
    return str(addresses[0])


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """
    >>> [_is_public(ipaddress.ip_address(one)) for one in ("1.1.1.1", "10.0.0.1", "64:ff9b::1.1.1.1", "64:ff9b::10.0.0.1")]
    [True, False, True, False]
    """
    if isinstance(address, ipaddress.IPv6Address):
        if mapped := address.ipv4_mapped:
            return _is_public(mapped)
        if address in NAT64:  # a network without IPv4 reaches every public IPv4 host so
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in UNICAST or any(address in tunnel for tunnel in TUNNELS):
            return False
    return address.is_global and not address.is_multicast
