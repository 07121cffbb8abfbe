"""Stores to run a test on: a folder, and a bucket."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.store.objects import Store
from tests.s3 import serving

KINDS = ("file", "s3")


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Store]:
    """An empty store: ``file`` under ``folder``, or ``s3`` over HTTP."""
    if kind == "file":
        yield Store((folder / "store").as_uri())
        return
    with serving() as (_, environment), pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        yield Store("s3://pool/store")
