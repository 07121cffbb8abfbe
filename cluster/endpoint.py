"""The address of a pool: its gateway's URL, and the key for it.

A command takes the first of these: ``--pool URL``, the variable ``SPRINGTIDE_POOL``, the pool that runs from this home. The key for a URL
is ``SPRINGTIDE_API_KEY``; the pool of this home has its own in its file, and that one never goes to another address.
"""

import os
from typing import NamedTuple
from urllib.parse import urlsplit

from cluster import config as configuration
from cluster.config import API_KEY, POOL_URL, Config
from cluster.errors import BadRequest
from cluster.pool import local


class Endpoint(NamedTuple):
    url: str
    """``http(s)://host:port``, without a slash at its end."""
    key: str

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r})"  # never the key, which a log line would keep


def find(url: str | None = None) -> Endpoint:
    """The pool that a command means; ``url`` is what its ``--pool`` says. Raises `PoolUnavailable` where none is named and none runs here."""
    named = url or os.environ.get(POOL_URL)
    return Endpoint(checked(named), os.environ.get(API_KEY, "")) if named else of(configuration.load())


def of(config: Config) -> Endpoint:
    """The pool that runs from this home, by the file that it wrote there."""
    pool = local.require(config)
    return Endpoint(pool.gateway, pool.token)


def variables(pool: Endpoint) -> dict[str, str]:
    """What a shell elsewhere needs for this pool."""
    return {POOL_URL: pool.url, API_KEY: pool.key}


def checked(url: str) -> str:
    """A gateway's URL in the form in which paths are appended to it. Raises `BadRequest`.

    >>> checked("http://127.0.0.1:8000/v1/")
    'http://127.0.0.1:8000'
    """
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query + parts.fragment:
            return url.rstrip("/").removesuffix("/v1")  # what OpenAI's clients call the base URL
    except ValueError:
        pass
    raise BadRequest(f"{url[:200]!r} is not the URL of a gateway.", "Write it as http://HOST:PORT.", param="pool")
