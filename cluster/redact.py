"""Keeps secrets and places of this cluster out of what is written down or sent to a client.

A presigned URL in an error would stay in an alias's history for good. An engine's words name folders and addresses of its machine.
"""

import re
from urllib.parse import urlsplit

from cluster.errors import SpringtideError

URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/@'\"<>]*@)?(?P<rest>[^\s?#'\"<>]*)(?:[?#][^\s'\"<>]*)?")
ADDRESS = re.compile(r"\b[a-z][a-z0-9+]*://\S+|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b")
FOLDER = re.compile(r"(?<![\w.])/(?:[^\s/'\"]+/)+")
LONGEST = 500


def redact(text: str) -> str:
    """``text`` with every URL in it cut down to what names the object: no user, password, query string or fragment.

    >>> redact("GET https://key:pw@bucket.s3.example/m/1?X-Amz-Signature=abc failed")
    'GET https://bucket.s3.example/m/1 failed'
    """
    return URL.sub(lambda url: url["scheme"] + url["rest"], text)


def redact_source(source: str) -> str:
    """A path, upload or URL, where ``source`` is nothing else: quotes and spaces in it are its own. A URL loses what `redact` takes away.

    >>> redact_source("https://me:secret@host/lines.jsonl?X-Amz-Signature=0123")
    'https://host/lines.jsonl'
    """
    if "://" not in source:
        return source
    try:
        parts = urlsplit(source)
    except ValueError:  # no URL after all
        return source.partition("?")[0]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def redact_places(words: str) -> str:
    """The words of vLLM or of a library, without addresses and without folders.

    >>> redact_places("No adapter in '/tmp/cache/ab12/'; see https://10.1.2.3:80/x")
    "No adapter in ''; see …"
    """
    return FOLDER.sub("", ADDRESS.sub("…", words))[:LONGEST].strip()


def reason(error: Exception) -> str:
    """Why something failed, for a rollout's record: our own errors as they are, others by their class and without places.

    >>> reason(RuntimeError("no space on /home/ann/cache/model.safetensors, asked 10.0.0.7:6379"))
    'RuntimeError: no space on model.safetensors, asked …'
    """
    if isinstance(error, SpringtideError):
        return str(error)
    words = redact_places(str(error))
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
