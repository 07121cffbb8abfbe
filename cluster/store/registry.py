"""Versions and aliases in the store.

::

    versions/<name>/<n>/claim             taken first, create-only: n belongs to one publisher
    versions/<name>/<n>/files/…           Hugging Face or PEFT layout, safetensors only
    versions/<name>/<n>/manifest.json     written last: its presence = complete
    versions/<name>/<n>/verdicts/<k>.json append-only; the highest k counts
    aliases/<alias>/<generation>.json     append-only; the highest generation wins
    rollouts/<alias>/<number>/<n>.json    append-only; the highest n of the highest number is where the alias is now

A publisher that dies between claim and manifest leaves a number that nobody uses; readers never see it.
"""

import json
import time
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast
from uuid import uuid4

from cluster.errors import Conflict, DigestMismatch, ModelNotFound, StoreUnavailable, VersionRefused
from cluster.publishing.gate import Verdict
from cluster.publishing.rollout import Rollout
from cluster.store.journal import Journal
from cluster.store.objects import Store, sha256
from cluster.types import File, Generation, Kind, Lineage, Manifest, VersionId, check_name

LAYOUT: dict[Kind, tuple[str, str]] = {
    "weights": ("config.json", ".safetensors"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
}
"""Per kind, the configuration file and the ending of at least one tensor file that must be there."""

ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
"""What a version may be made of. Everything else is refused: many formats run code when they are read."""


class Canary(TypedDict, total=False):
    """What a move says beside the stable version; see `Generation`."""

    canary: VersionId | None
    percent: int
    shadow_percent: int
    rollout: int | None
    record: int


class Registry:
    """Versions and aliases over one `Store`. Manifests and generations never change, so each is read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._manifests: dict[VersionId, Manifest] = {}
        self._moves = Journal(store, Generation)
        self._rollouts = Journal(store, Rollout)
        self._verdicts = Journal(store, Verdict)
        self._found: dict[Path, tuple[int, int, str]] = {}
        """Path → (time of change, size, sha256) of what this process has read: a base is not read again for each adapter on it."""

    # versions

    def register(self, name: str, kind: Kind, base: VersionId | None, folder: Path, lineage: Lineage) -> Manifest:
        """Copy ``folder`` into the store as the next version of ``name`` and return its manifest.

        Raises `VersionRefused` for a folder that could not be served safely, before anything is written.
        """
        check_name(name)
        if (base is None) != (kind == "weights"):
            raise VersionRefused(f"A version of kind {kind} {'needs' if base is None else 'has no'} base.", param="base")
        if base is not None and self.manifest(base).kind != "weights":
            raise VersionRefused(f"{base} is an adapter.", "Use a weights version as the base.", param="base")
        paths = check_layout(folder, kind)
        version = self._claim(name)
        root = f"versions/{name}/{version.n}"
        files = tuple(File(path=p, sha256=sha256(folder / p), size_bytes=(folder / p).stat().st_size) for p in paths)
        manifest = Manifest(id=version, kind=kind, base=base, files=files, lineage=lineage, created_s=time.time())
        try:
            for file in files:
                self.store.upload(f"{root}/files/{file.path}", folder / file.path)
            self.store.put_new(f"{root}/manifest.json", manifest.model_dump_json(indent=1).encode())
        except StoreUnavailable:
            self.store.remove(f"{root}/files")  # a full disk must not stay full of half a version; the number stays taken
            raise
        return manifest

    def _claim(self, name: str) -> VersionId:
        n = max(self._numbers(f"versions/{name}"), default=0) + 1
        while True:
            try:
                self.store.put_new(f"versions/{name}/{n}/claim", b"")
                return VersionId(name, n)
            except Conflict:
                n += 1

    def _numbers(self, prefix: str) -> list[int]:
        return sorted(int(child) for child in self.store.children(prefix) if child.isdigit())

    def names(self) -> list[str]:
        return self.store.children("versions")

    def versions(self, name: str) -> list[Manifest]:
        """Every complete version of ``name``, oldest first."""
        ids = (VersionId(name, n) for n in self._numbers(f"versions/{check_name(name)}"))
        return [manifest for id in ids if (manifest := self._read(id))]

    def manifest(self, id: VersionId) -> Manifest:
        """The manifest of ``id``, or `ModelNotFound` with the versions that exist."""
        if manifest := self._read(id):
            return manifest
        known = ", ".join(str(m.id) for m in self.versions(id.name)) or "none"
        raise ModelNotFound(f"The version {id} does not exist.", f"Known versions of {id.name}: {known}.", param="model")

    def _read(self, id: VersionId) -> Manifest | None:
        if id not in self._manifests:
            raw = self.store.get(f"versions/{id.name}/{id.n}/manifest.json")
            if raw is None:
                return None
            try:
                self._manifests[id] = Manifest.model_validate_json(raw)
            except ValueError as error:
                raise VersionRefused(f"The manifest of {id} is damaged: {error}.", "Restore it, or register it again.") from error
        return self._manifests[id]

    def fetch(self, manifest: Manifest, cache: Path) -> Path:
        """A local folder with the version's files, every digest checked.

        A ``file://`` store is read in place; anything else is copied to ``cache`` once. Raises `DigestMismatch`.
        """
        root = f"versions/{manifest.id.name}/{manifest.id.n}/files"
        local = self.store.local_root
        folder = local / root if local else cache / manifest.digest
        for file in manifest.files:
            path = folder / file.path
            if local is None and not path.exists():
                partial = path.with_name(f"{path.name}.{uuid4().hex}")  # several processes of a machine may fetch at once
                self.store.download(f"{root}/{file.path}", partial)
                partial.replace(path)
            self._check(manifest.id, file, path, cached=local is None)
        return folder

    def _check(self, id: VersionId, file: File, path: Path, cached: bool) -> None:
        found = self._sha256(path) if path.is_file() else "nothing"
        if found == file.sha256:
            return
        if cached:
            path.unlink(missing_ok=True)
        raise DigestMismatch(
            f"{file.path} of {id} does not match its manifest: expected sha256 {file.sha256[:12]}…, found {found[:12]}….",
            "The stored file was changed or damaged. Register the version again; the live one is untouched.",
        )

    def _sha256(self, path: Path) -> str:
        now = path.stat()
        known = self._found.get(path)
        if known is None or known[:2] != (now.st_mtime_ns, now.st_size):
            known = self._found[path] = (now.st_mtime_ns, now.st_size, sha256(path))
        return known[2]

    # aliases

    def aliases(self) -> dict[str, Generation]:
        """Every alias at its newest generation."""
        names = self.store.children("aliases")
        return {name: newest for name in names if (newest := self.alias(name))}

    def alias(self, name: str) -> Generation | None:
        return self._moves.last(f"aliases/{check_name(name)}")

    def meant(self, text: str) -> Manifest:
        """The version that is written NAME@NUMBER, or what is live by an alias. Raises `ModelNotFound` with what there is."""
        if "@" in text:
            return self.manifest(VersionId.parse(text))
        if move := self.alias(text):
            return self.manifest(move.stable)
        known = ", ".join(self.aliases()) or "none"
        raise ModelNotFound(f"There is no model {text!r}.", f"Models: {known}. A version is written NAME@NUMBER.", param="base")

    def histories(self) -> dict[str, list[Generation]]:
        """Every alias with all its generations, oldest first."""
        return {name: moves for name in self.store.children("aliases") if (moves := self.history(name))}

    def history(self, name: str) -> list[Generation]:
        """Every generation of an alias, oldest first."""
        return self._moves.all(f"aliases/{check_name(name)}")

    def move(self, alias: str, stable: VersionId, reason: str, author: str, after: int, **canary: Unpack[Canary]) -> Generation:
        """Append generation ``after + 1``. Raises `Conflict` where somebody moved the alias since ``after`` was read."""
        self.manifest(stable)
        move = Generation(
            alias=check_name(alias),
            generation=after + 1,
            stable=stable,
            reason=reason,
            author=author,
            time_s=time.time(),
            **canary,
        )
        return self._moves.append(f"aliases/{alias}", move.generation, move)

    def ever_live(self, weights: VersionId, limit: int) -> list[Manifest]:
        """The adapters that replicas with these weights should hold: the last ``limit`` that were live or canary on them, those of now last.

        Older ones stay in the store; a version that never went live is nobody's to call.
        """
        histories = self.histories().values()
        live = [version for moves in histories for version in reversed(moves[-1].versions)]
        past = [version for moves in histories for move in moves for version in move.versions]
        ordered = dict.fromkeys([*(id for id in past if id not in live), *live])
        known = (manifest for id in ordered if (manifest := self._readable(id)))
        return [manifest for manifest in known if manifest.base == weights][-limit:]

    def _readable(self, id: VersionId) -> Manifest | None:
        """A version of the past that was damaged since must not keep a replica from starting."""
        try:
            return self._read(id)
        except VersionRefused:
            return None

    def previous(self, alias: str) -> VersionId:
        """The version to roll back to: what was live before the live one was first published.

        A move back takes everything after it away, so rolling back twice goes back two versions, and never forward to a bad one.
        """
        history = self.history(alias)
        if not history:
            raise ModelNotFound(f"There is no alias {alias}.", "See `springtide models` for the ones that exist.", param="model")
        stack: list[VersionId] = []
        for move in history:
            stack = [*stack[: stack.index(move.stable)], move.stable] if move.stable in stack else [*stack, move.stable]
        if len(stack) < 2:
            raise Conflict(
                f"{alias} served nothing before {stack[0]}; there is nothing to roll back to.", "Name a version with --to NAME@N."
            )
        return stack[-2]

    # rollouts and verdicts

    def rollout(self, alias: str) -> Rollout | None:
        """The newest record of the alias's newest rollout."""
        numbers = self._numbers(f"rollouts/{check_name(alias)}")
        return self._rollouts.last(f"rollouts/{alias}/{numbers[-1]}") if numbers else None

    def rollouts(self, alias: str) -> list[list[Rollout]]:
        """Every rollout of the alias, oldest first, each with all its records."""
        return [self.records(alias, number) for number in self._numbers(f"rollouts/{check_name(alias)}")]

    def records(self, alias: str, number: int) -> list[Rollout]:
        """One rollout's records, oldest first."""
        return self._rollouts.all(f"rollouts/{check_name(alias)}/{number}")

    def record(self, rollout: Rollout) -> Rollout:
        """Append a record. Raises `Conflict` where another control, or another publish, was faster."""
        self.manifest(rollout.version)
        return self._rollouts.append(f"rollouts/{check_name(rollout.alias)}/{rollout.number}", rollout.n, rollout)

    def verdicts(self, id: VersionId) -> list[Verdict]:
        """Every verdict on a version, oldest first."""
        return self._verdicts.all(f"versions/{id.name}/{id.n}/verdicts")

    def judge(self, verdict: Verdict) -> Verdict:
        """Store a verdict with its version."""
        self.manifest(verdict.version)
        prefix = f"versions/{verdict.version.name}/{verdict.version.n}/verdicts"
        return self._verdicts.append(prefix, max(self._verdicts.numbers(prefix), default=0) + 1, verdict)


def check_layout(folder: Path, kind: Kind) -> list[str]:
    """The relative paths of a version's files, or `VersionRefused` for what must not be served."""
    config_name, tensors = LAYOUT[kind]
    if not (folder / config_name).is_file():
        raise VersionRefused(f"{folder} has no {config_name}.", f"A version of kind {kind} is a folder in Hugging Face layout.")
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() and not _hidden(path.relative_to(folder)))
    for path in paths:
        _check_file(path)
    names = [str(path.relative_to(folder)) for path in paths]
    if not any(name.endswith(tensors) for name in names):
        raise VersionRefused(f"{folder} has no {tensors} file.", "Save it with safe_serialization=True.")
    for path in (path for path in paths if path.name.endswith("config.json")):
        if "auto_map" in _config(path):
            raise VersionRefused(f"{path} names code to run (auto_map).", "Remote code is never run; remove it.")
    return names


def _hidden(path: Path) -> bool:
    """Whether any part of it is: a folder that a hub's downloader filled keeps its notes in ``.cache``."""
    return any(part.startswith(".") for part in path.parts)


def _check_file(path: Path) -> None:
    if path.is_symlink():
        raise VersionRefused(
            f"{path} is a symbolic link.", f"Give a folder with the files themselves: cp -rL {path.parent} COPY."
        )
    if path.suffix not in ENDINGS and path.name not in ("LICENSE", "NOTICE"):
        raise VersionRefused(f"{path} could run code when it is read.", f"Accepted are files ending in {', '.join(ENDINGS)}.")


def _config(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise VersionRefused(f"{path} is not valid JSON: {error}.", "Save the model again.") from error
    if not isinstance(found, dict):
        raise VersionRefused(f"{path} holds no JSON object.", "Save the model again.")
    return cast(dict[str, Any], found)
