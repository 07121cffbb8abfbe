"""What an engine says about a failure to others: the engine's own words, without addresses and folders of this cluster."""

import re

from cluster.errors import SpringtideError

ADDRESS = re.compile(r"\b[a-z][a-z0-9+]*://\S+|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b")
FOLDER = re.compile(r"(?<![\w.])/(?:[^\s/'\"]+/)+")
LONGEST = 500


def reason(error: Exception) -> str:
    """Why something failed, for a rollout's record.

    >>> reason(RuntimeError("no space on /home/ann/cache/model.safetensors, asked 10.0.0.7:6379"))
    'RuntimeError: no space on model.safetensors, asked …'
    """
    if isinstance(error, SpringtideError):
        return str(error)
    words = without_places(str(error))
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def without_places(words: str) -> str:
    """The words of vLLM or of a library, without addresses and without folders.

    >>> without_places("No adapter in '/tmp/cache/ab12/'; see https://10.1.2.3:80/x")
    "No adapter in ''; see …"
    """
    return FOLDER.sub("", ADDRESS.sub("…", words))[:LONGEST].strip()
