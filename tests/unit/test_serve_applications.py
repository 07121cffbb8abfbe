"""Serve's applications as control sees them, while Serve is slower to show one than control is to ask."""

from typing import Any

import pytest

from cluster import config as configuration
from cluster.control import applications
from cluster.control.applications import Application, Applications


def test_an_application_that_was_just_asked_for_is_there_until_serve_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be asked for again, and Serve would deploy what is starting anew."""
    shown: dict[str, Any] = {}
    monkeypatch.setattr(applications.serve_details, "applications", lambda: shown)
    monkeypatch.setattr(applications.graph, "start_fleet", lambda spec: None)  # pyright: ignore[reportUnknownLambdaType]
    known = Applications(lambda: pytest.fail("not asked"))
    known.refresh()
    known.start_fleet(configuration.load(overrides={"store": "memory:///"}).spec("seedling"))
    assert known.known["fleet-seedling"] == Application("DEPLOYING", starting=1)
    known.refresh()
    assert known.there("fleet-seedling") and not known.known["fleet-seedling"].steady
    shown["fleet-seedling"] = {
        "status": "RUNNING",
        "message": "",
        "deployments": {"R": {"message": "", "replicas": [{"state": "RUNNING"}]}},
    }
    known.refresh()
    assert known.known["fleet-seedling"] == Application("RUNNING", running=1) and known.known["fleet-seedling"].steady
    shown.clear()
    known.refresh()
    assert known.known == {}, "it has gone, and is not taken for starting"
    monkeypatch.setattr(applications, "SHOWN_S", 0.0)
    known.start_fleet(configuration.load(overrides={"store": "memory:///"}).spec("seedling"))
    known.refresh()
    assert known.known == {}, "what Serve never shows is asked for again"
