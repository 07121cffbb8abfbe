"""Make a version the one that its alias means: ``python -m jobs.publish seedling@2``.

Control takes it through the pool's policy: gate, canary, and where every replica has acknowledged its digest, live.
"""

import getpass

from cluster.config import load
from cluster.publishing.rollout import Rollout
from cluster.types import VersionId
from jobs import Parser, main, reach


def publish(version: VersionId, alias: str, reason: str, author: str) -> Rollout:
    """Ask the running pool's control. A refusal arrives as itself (`VersionRefused`, `Conflict`, …), and nothing has changed."""
    from cluster.control import client  # imports Ray, which a wrong command line need not wait for

    return client.connect().publish(str(version), alias, reason, author)


def run() -> None:
    parser = Parser("jobs.publish", description="Make a version live.")
    parser.add_argument("version", help="NAME@NUMBER, for example seedling@2")
    parser.add_argument("--alias", help="the model name that clients use; the version's own name by default")
    parser.add_argument("--reason", default="published by hand")
    arguments = parser.parse_args()
    reach(load())
    version = VersionId.parse(arguments.version)
    rollout = publish(version, arguments.alias or version.name, arguments.reason, getpass.getuser())
    print(f"{rollout.version} on {rollout.alias}: {rollout.stage} ({rollout.reason})")


if __name__ == "__main__":
    main(run)
