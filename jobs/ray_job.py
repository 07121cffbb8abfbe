"""Reads the id under which Ray 2.60 runs a job, from an environment variable that Ray keeps private. A contract test pins the variable.

There is no public way. Ray's runtime context knows the driver's own id, and not the id that the job was submitted under.
"""

import json
import os


def submission_id() -> str:
    """The id that `ray job submit` gave the job of this process; empty if the process is no such job."""
    metadata = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}
    return str(metadata.get("job_submission_id") or "")
