"""New weights travel once per cluster: control, which has looked through them, puts them into Ray's object store, and every machine takes
them from there.

Without it each machine would read the bucket by itself, at the same moment. A store that is a folder is read in place, and carries
nothing. Digests are checked where the files arrive (`Registry.fetch`), so nothing here needs to be trusted.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (Ray's own annotations are partial; what comes back is typed at once.)
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import RayError

from cluster import logs
from cluster.config import CACHE_BYTES
from cluster.store.files import arriving, in_use, make_room
from cluster.store.registry import Registry
from cluster.types import Manifest

Carried = dict[str, dict[str, Any]]
"""Digest of a version → path of a file → reference to its bytes in Ray's object store."""

log = logs.logger(__name__)


def load(registry: Registry, manifests: list[Manifest], cache: Path) -> Carried:
    """References to every file of these versions, taken from this process's own copy; one file at a time is in its memory."""
    if registry.store.local_root is not None:
        return {}
    return {manifest.digest: _put(registry, manifest, cache) for manifest in manifests}


def _put(registry: Registry, manifest: Manifest, cache: Path) -> dict[str, Any]:
    with registry.candidate(manifest.id, cache) as one:
        return {file.path: ray.put((one.folder / file.path).read_bytes()) for file in manifest.files}


def unpack(carried: Carried, cache: Path, limit_bytes: int = CACHE_BYTES) -> None:
    """Write what was carried into this machine's cache, where `Registry.fetch` looks before it asks the store."""
    with ExitStack() as used:
        for digest in carried:  # all of them before the first: making room for one must not take another
            used.enter_context(in_use(cache / digest))
        for digest, files in carried.items():
            for path, reference in files.items():
                target = cache / digest / path
                if not target.exists():
                    _write(target, reference, cache, limit_bytes)


def _write(target: Path, reference: Any, cache: Path, limit_bytes: int) -> None:
    try:
        content = cast(bytes | None, ray.get(reference))
    except RayError as error:  # whoever owned it was restarted: the store still has it
        log.warning("not carried: %s", error)
        return
    if content is not None:
        make_room(cache, len(content), limit_bytes)
        with arriving(target) as partial:  # several replicas of a machine may unpack at once
            partial.write_bytes(content)
