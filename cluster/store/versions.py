"""Versions: immutable artefacts, numbered by name.

::

    versions/<name>/<n>/claim             taken first, create-only: n belongs to one publisher
    versions/<name>/<n>/files/…           Hugging Face or PEFT layout, safetensors only
    versions/<name>/<n>/manifest.json     written last: its presence = complete

A publisher that dies between claim and manifest leaves a number that nobody uses; readers never see it.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from cluster.errors import Conflict, ModelNotFound, StoreUnavailable, VersionRefused
from cluster.store.journal import AHEAD, Damages, decode, encode, highest
from cluster.store.layout import check_files, files_in
from cluster.store.objects import Store, sha256
from cluster.types import (
    NAME,
    File,
    Kind,
    Lineage,
    Manifest,
    VersionId,
    check_name,
    check_path,
    interim_name,
    is_interim,
)

NAMED = 20
"""Versions that an error message names, the newest."""


class Versions:
    """The versions in one store. Manifests never change, so each is read once."""

    def __init__(self, store: Store, damages: Damages) -> None:
        self.store = store
        self.damages = damages
        self._manifests: dict[VersionId, Manifest] = {}
        self._highest: dict[str, int] = {}

    def register(self, name: str, kind: Kind, base: VersionId | None, folder: Path, lineage: Lineage) -> Manifest:
        """Copy ``folder`` into the store as the next version of ``name`` and return its manifest.

        Raises `VersionRefused` for a folder that could not be served safely, before anything is written.
        """
        return self._register(check_name(name), kind, base, folder, lineage)

    def register_interim(self, run: str, base: VersionId, folder: Path, lineage: Lineage) -> Manifest:
        """`register` for an adapter that ``run`` has made on its way. `remove` it when the run needs it no more."""
        return self._register(check_path(interim_name(run)), "adapter", base, folder, lineage)

    def _register(self, name: str, kind: Kind, base: VersionId | None, folder: Path, lineage: Lineage) -> Manifest:
        if (base is None) != (kind == "weights"):
            raise VersionRefused(f"A version of kind {kind} {'needs' if base is None else 'has no'} base.", param="base")
        if base is not None and self.manifest(base).kind != "weights":
            raise VersionRefused(f"{base} is an adapter.", "Use a weights version as the base.", param="base")
        files = files_in(folder)
        check_files(files, kind, folder)
        return self._put(name, kind, base, files, lineage)

    def register_weights(self, name: str, files: Mapping[str, Path], origin: Path, lineage: Lineage) -> Manifest:
        """`register` for weights whose files are in several places. ``files``: path in the version → the file."""
        check_name(name)
        check_files(files, "weights", origin)
        return self._put(name, "weights", None, files, lineage)

    def _put(self, name: str, kind: Kind, base: VersionId | None, sources: Mapping[str, Path], lineage: Lineage) -> Manifest:
        version = self._claim(name)
        files = tuple(File(path=p, sha256=sha256(s), size_bytes=s.stat().st_size) for p, s in sorted(sources.items()))
        manifest = Manifest(id=version, kind=kind, base=base, files=files, lineage=lineage, created_s=time.time())
        try:
            for file in files:
                self.store.upload(f"{files_of(version)}/{file.path}", sources[file.path])
            self.store.put_own(_manifest(version), encode(manifest))
        except StoreUnavailable:
            self.store.remove(files_of(version))  # a full disk must not stay full of half a version; the number stays taken
            raise
        return manifest

    def remove(self, id: VersionId) -> None:
        """Remove an interim version. Its claim stays, so no other version ever has its number."""
        self.store.delete(_manifest(id))  # first: without it no reader looks for the files
        self.store.remove(files_of(id))
        self.forget(id)

    def remove_interims(self, run: str) -> None:
        """Remove every interim version of a run that is no more, their claims included: no other run has its name."""
        self.store.remove(f"versions/{check_path(interim_name(run))}")

    def interims(self, run: str) -> list[VersionId]:
        """The complete interim versions of a run, oldest first."""
        return [manifest.id for manifest in self.all(interim_name(run))]

    def forget(self, id: VersionId) -> None:
        """Its manifest is not needed any more."""
        self._manifests.pop(id, None)

    def _claim(self, name: str) -> VersionId:
        n = self.highest(name) + 1
        while True:
            try:
                self.store.put_own(_claim(name, n), uuid4().hex.encode())
                return VersionId(name, n)
            except Conflict:
                n += 1

    def highest(self, name: str) -> int:
        """The highest number of ``name`` that was ever taken; complete or not."""
        known = self._highest.get(name, 0)
        found = highest(lambda n: self.store.size(_claim(name, n)) is not None, known, AHEAD)
        self._highest[name] = found
        return found

    def names(self) -> list[str]:
        """What no model can be called is left out, and so are interim models."""
        return [name for name in self.store.children("versions") if NAME.fullmatch(name) and not is_interim(name)]

    def all(self, name: str) -> list[Manifest]:
        """Every complete version of ``name``, oldest first. Damaged ones are reported and left out."""
        numbers = sorted(int(child) for child in self.store.children(f"versions/{check_path(name)}") if child.isdigit())
        return [manifest for n in numbers if (manifest := self.readable(VersionId(name, n)))]

    def recent(self, name: str, count: int) -> list[Manifest]:
        """The complete ones among the newest ``count`` numbers, oldest first."""
        last = self.highest(check_path(name))
        ids = (VersionId(name, n) for n in range(max(1, last - count + 1), last + 1))
        return [manifest for id in ids if (manifest := self.readable(id))]

    def manifest(self, id: VersionId) -> Manifest:
        """The manifest of ``id``, or `ModelNotFound` with the newest versions that exist."""
        if manifest := self.find(id):
            return manifest
        known = ", ".join(str(m.id) for m in self.recent(id.name, NAMED)) or "none"
        raise ModelNotFound(f"The version {id} does not exist.", f"Known versions of {id.name}: {known}.", param="model")

    def readable(self, id: VersionId) -> Manifest | None:
        """The manifest, None where it is damaged or there is none."""
        try:
            return self.find(id)
        except VersionRefused:
            return None

    def find(self, id: VersionId) -> Manifest | None:
        """The manifest, None where there is none. Raises `VersionRefused` where it is damaged."""
        if id not in self._manifests:
            raw = self.store.get(_manifest(id))
            if raw is None:
                return None
            try:
                self._manifests[id] = decode(Manifest, raw)
            except ValueError as error:
                self.damages.report(_manifest(id), str(error))
                raise VersionRefused(f"The manifest of {id} is damaged: {error}.", "Restore it, or register it again.") from error
            self.damages.healed(_manifest(id))
        return self._manifests[id]


def files_of(id: VersionId) -> str:
    return f"versions/{id.name}/{id.n}/files"


def _manifest(id: VersionId) -> str:
    return f"versions/{id.name}/{id.n}/manifest.json"


def _claim(name: str, n: int) -> str:
    return f"versions/{name}/{n}/claim"
