"""Makes a version live: ``python -m jobs.publish seedling@2``.

Control takes the version through the pool's policy: the gate, then the canary. The version is live once every replica has confirmed its digest.
"""

from cluster.config import load
from cluster.jobspec import Publish, command_line
from cluster.publishing.rollout import Rollout
from cluster.types import VersionId
from jobs import main, reach
from jobs.record import record


def publish(version: VersionId, alias: str, reason: str, author: str) -> Rollout:
    """Ask the running pool's control. Raises what control raises (`VersionRefused`, `Conflict`, …); then nothing has changed."""
    from cluster.control import client  # imports Ray: a wrong command line must fail before that

    return client.connect().publish(str(version), alias, reason, author)


def run() -> None:
    options: Publish = command_line("publish")
    config = load()
    with record(config, options) as job:
        reach(config)
        rollout = publish(options.version, options.alias or options.version.name, options.reason, job.spec.owner)
        job.made(version=str(rollout.version), alias=rollout.alias, stage=rollout.stage)
        print(f"{rollout.version} on {rollout.alias}: {rollout.stage} ({rollout.reason})")


if __name__ == "__main__":
    main(run)
