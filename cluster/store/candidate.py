"""A version that is looked at: its manifest, and as much of its files as is asked for.

Most questions about weights need their configuration and the headers of their tensors: some kilobytes of many gigabytes.
"""

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.store.files import Files
from cluster.store.headers import Tensor
from cluster.types import Manifest


class Candidate:
    """One version, loaded once however many checks look at it. Used in a ``with``: afterwards the cache may give its files up."""

    def __init__(self, manifest: Manifest, files: Files, cache: Path) -> None:
        self.manifest = manifest
        self._files = files
        self._cache = cache

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for taken in ("folder", "settings"):
            if self.__dict__.pop(taken, None) is not None:
                self._files.release(self.manifest)

    @cached_property
    def folder(self) -> Path:
        """A local folder with every file, its digest checked."""
        return self._files.fetch(self.manifest, self._cache)

    @cached_property
    def settings(self) -> Path:
        """A local folder with every file but the tensors: configuration, tokenizer, chat template."""
        return self._files.fetch_settings(self.manifest, self._cache)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensor name → dtype and shape, from the headers alone. Nobody's digest covers a header by itself: what is loaded into an engine is
        checked whole, by whoever loads it."""
        return self._files.tensors(self.manifest, self._cache)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}
