"""Connections to an object store, with limits on how long it may take to answer.

obstore's own limits do not fit: 30 s for a whole request, its body included, is too little for a file of some gigabytes, and three minutes of
attempts are too much for control's loop, which stands still meanwhile. So what counts here is silence: how long a store sends nothing.
"""

import os
from datetime import timedelta
from typing import Any, NamedTuple

from obstore import parse_scheme
from obstore.store import from_url


class Limits(NamedTuple):
    """How long an object store may take."""

    silent_s: float
    """Until it begins to answer, what is sent to it included, and between two parts of an answer."""
    retry_s: float
    """No further attempt begins after this long. An attempt waits for at most 15 s before it begins."""


DOCUMENTS = Limits(silent_s=10, retry_s=20)
"""A bucket that hangs stops control's loop for 20 s, and one that fails in any other way for 45 s at most. Whoever waits for the loop
waits longer (`cluster.control.loop.CALL_TIMEOUT_S`)."""
FILES = Limits(silent_s=60, retry_s=300)
"""An upload sends 12 parts of 5 MiB at once: at 1 MiB/s they take a minute. A download whose connection breaks goes on where it was."""
CONNECT_TIMEOUT_S = 5
UNLIMITED = timedelta(days=30)

VARIABLES = {"s3": "AWS_", "gcs": "GOOGLE_", "azure": "AZURE_"}
"""Object stores, and how the variables begin that obstore reads for each."""
OPTIONS = (
    *("allow_http", "allow_invalid_certificates", "root_certificate", "randomize_addresses", "user_agent"),
    *("proxy_url", "proxy_ca_certificate", "proxy_excludes", "http1_only", "http2_only", "http2_keep_alive_interval"),
    *("http2_keep_alive_timeout", "http2_keep_alive_while_idle", "pool_idle_timeout", "pool_max_idle_per_host"),
    *("connect_timeout", "read_timeout", "timeout"),
)
"""Those of obstore's `ClientConfig` that variables may set, such as ``AWS_ALLOW_HTTP``."""


def is_remote(url: str) -> bool:
    return parse_scheme(url) in VARIABLES


def connect(url: str, limits: Limits) -> Any:
    """obstore's store for ``url``. Raises its errors. One that is not remote has no limits."""
    if not is_remote(url):
        return from_url(url)
    client = {"connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S), "read_timeout": timedelta(seconds=limits.silent_s)}
    options: Any = {**client, "timeout": UNLIMITED, **_of_environment(VARIABLES[parse_scheme(url)])}
    return from_url(url, client_options=options, retry_config={"retry_timeout": timedelta(seconds=limits.retry_s)})


def _of_environment(prefix: str) -> dict[str, str]:
    """The options that variables set: obstore reads none of them where options are given in code."""
    found = ((option, os.environ.get(f"{prefix}{option.upper()}")) for option in OPTIONS)
    return {option: value for option, value in found if value is not None}
