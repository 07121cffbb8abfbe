"""A control actor that dies just before its n-th act, for enumerating crash points: ``python -m tests.crashing`` puts it in place.

An act is whatever outlives the process: a write to the store, a word to the gateways, an order to the replicas. What to do is in
``crash.json`` in the pool's home: ``{"run": "x", "at": 3}`` dies before the third act since this run was ordered; without the file
nothing dies. Each act is
written to ``acts.log``.
"""

# pyright: reportAttributeAccessIssue=false, reportFunctionMemberAccess=false
# (Ray's own annotations are partial.)
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.cloudpickle
import ray.exceptions

from cluster import config as configuration
from cluster.control.actor import Control, remote
from cluster.control.client import ACTOR, NAMESPACE
from cluster.pool import local


class CrashingControl(Control):
    def __init__(self, config: dict[str, Any]) -> None:
        self.home, self.run, self.acts = Path(config["home"]), "", 0
        super().__init__(config)
        put, tell, order = self.registry.store.put_new, self.gateways._tell, self.replicas.tell
        self.registry.store.put_new = lambda path, data: self._act(f"write {path}", put, path, data)
        self.gateways._tell = lambda method, *a, **k: self._act(f"tell gateways {method}", tell, method, *a, **k)
        self.replicas.tell = lambda app, method, *a: self._act("tell replicas", order, app, method, *a)
        start, end = self.applications.start_surge, self.applications.end
        self.applications.start_surge = lambda *a: self._act("start a surge", start, *a)
        self.applications.end = lambda *a: self._act("end an application", end, *a)

    def _act(self, what: str, do: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        plan = self.home / "crash.json"
        if plan.exists():
            order = json.loads(plan.read_text())
            self.run, self.acts = order["run"], self.acts + 1 if self.run == order["run"] else 1
            with (self.home / "acts.log").open("a") as file:
                file.write(f"{what}\n")
            if self.acts == order["at"]:
                plan.unlink()
                os._exit(1)
        return do(*arguments, **options)


def install() -> None:
    """Replace the running control. A gateway may be faster and bring back an ordinary one: then again."""
    config = local.remembered(configuration.load())
    running = local.require(config)
    ray.init(address=running.address, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[CrashingControl.__module__])
    for _ in range(20):
        ray.kill(ray.get_actor(ACTOR, namespace=NAMESPACE), no_restart=True)
        try:
            actor = remote(CrashingControl).remote(config.dump())
            ray.get(actor.view.remote(), timeout=60)
        except (ValueError, ray.exceptions.RayActorError):
            time.sleep(0.1)
            continue
        return
    raise SystemExit("it could not be put in place")


if __name__ == "__main__":
    install()
