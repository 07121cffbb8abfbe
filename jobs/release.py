"""Publishes what a job has trained: it asks for the rollout, measures the version for the gate, and waits for the gate's decision."""

import time
from collections.abc import Sequence

from cluster.config import Config
from cluster.errors import VersionRefused
from cluster.publishing.rollout import Rollout
from cluster.store.registry import Registry
from cluster.types import Manifest
from jobs.data.chat import Example
from jobs.evaluate import Sets, evaluate, supplied
from jobs.publish import publish
from jobs.record import JobRecord

DECIDED_S = 60
"""How long control may take to act on a verdict. It looks twice a second."""


def release(
    config: Config,
    registry: Registry,
    manifest: Manifest,
    reason: str,
    held_out: Sequence[Example],
    priority: int,
    job: JobRecord,
) -> Rollout:
    """Publish a version under its own name. Raises `VersionRefused` if the gate refuses it. ``held_out``: see `judged`."""
    rollout = publish(manifest.id, manifest.id.name, reason, job.id)
    return judged(config, registry, rollout, held_out, priority, job) if rollout.stage == "registered" else rollout


def judged(
    config: Config, registry: Registry, rollout: Rollout, held_out: Sequence[Example], priority: int, job: JobRecord
) -> Rollout:
    """Measure the version for the gate, and wait for the gate's decision. Raises `VersionRefused` if the gate refuses the version.

    ``held_out``: what the gate compares the loss on if the configuration names no sets.
    """
    sets = supplied(config)
    sets = sets if any(sets) else Sets(list(held_out), [], [])
    verdict = evaluate(config, registry, registry.manifest(rollout.version), rollout.incumbent, sets, priority, job)
    print(verdict.words, flush=True)
    deadline_s = time.monotonic() + DECIDED_S
    while rollout.stage == "registered" and time.monotonic() < deadline_s:
        time.sleep(0.2)
        rollout = registry.records(rollout.alias, rollout.number)[-1]
    if rollout.stage == "rolled_back":
        raise VersionRefused(f"{rollout.version} is registered but not live: {rollout.reason}", "The live version is unchanged.")
    return rollout
