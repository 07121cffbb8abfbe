"""What Ray 2.60 tells a job about itself, in a variable that it keeps private. A contract test names where it sets it.

There is no public way: Ray's runtime context knows a driver's own id and not the one that it was submitted under.
"""

import json
import os


def submission_id() -> str:
    """Of the job that `ray job submit` started this process as; empty where it did not."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}
    return str(metadata.get("job_submission_id") or "")
