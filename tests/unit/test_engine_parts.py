"""The parts of an engine that need no vLLM: what it holds, and what it says about failures."""

import asyncio
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cluster import redact
from cluster.config import Config, Fleet
from cluster.errors import DigestMismatch, StoreUnavailable
from cluster.store.files import make_room
from cluster.types import Lineage, Manifest, VersionId
from deployments.replica.adapters import Use, to_unload
from deployments.replica.holdings import Holdings
from deployments.replica.storage import Storage


def test_files_of_versions_that_an_engine_gave_up_may_leave_the_cache(tmp_path: Path) -> None:
    """Whatever an engine had fetched used to stay for as long as the engine lived."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    spec = Config(store="memory:///", home=tmp_path / "home").spec_of("f", Fleet())
    storage = Storage(spec)
    for n in range(3):
        save_file({"x": np.full(4, n, np.float32)}, folder / "model.safetensors")
        storage.registry.register("m", "weights", None, folder, Lineage())
    manifests = storage.registry.versions("m")

    async def fetched() -> list[Path]:
        return [await storage.fetch(manifest) for manifest in [*manifests, manifests[0]]]

    places = asyncio.run(fetched())
    make_room(storage.cache, 0, 0)
    assert all(place.exists() for place in places), "all are in use"
    storage.keep({"m@1", "m@3"})
    make_room(storage.cache, 0, 0)
    assert [place.exists() for place in places] == [True, False, True, True]
    storage.keep({"m@3"})
    make_room(storage.cache, 0, 0)
    assert [place.exists() for place in places] == [False, False, True, False]


def weights(n: int) -> Manifest:
    return Manifest(id=VersionId("m", n), kind="weights", base=None, files=(), lineage=Lineage(), created_s=0)


def test_other_weights_take_everything_away_that_followed_from_the_old_ones() -> None:
    holdings = Holdings("m@1", Path("/1"), "old", {"m@1": "d", "tuned@1": "e"}, staged={"m@2": "f"}, refused={"bad@1": "why"})
    assert holdings.adapters == ["tuned@1"]
    holdings.host(weights(2), Path("/2"), "new")
    assert (holdings.base, holdings.folder, holdings.fingerprint) == ("m@2", Path("/2"), "new")
    assert list(holdings.held) == ["m@2"] and not holdings.staged and holdings.adapters == []
    assert holdings.refused == {"bad@1": "why"}, "control has not read it yet"


def test_control_hears_of_every_refusal_and_of_its_end() -> None:
    holdings = Holdings("m@1", Path("/1"))
    holdings.refuse("bad@1", "too large")
    assert (holdings.refused, holdings.revision) == ({"bad@1": "too large"}, 1)
    holdings.clear_refusals("other@1")
    assert holdings.revision == 1
    holdings.clear_refusals("bad@1", "m@1")
    assert (holdings.refused, holdings.revision) == ({}, 2)


def test_a_refusal_keeps_no_secret_of_a_url() -> None:
    """A store's error with a SAS URL in it became a rollout's reason for good."""
    holdings = Holdings("m@1", Path("/1"))
    error = StoreUnavailable("The store failed: GET https://me:pw@a.blob.example/c/m?sv=1&sig=SECRET timed out.")
    holdings.refuse("bad@1", redact.reason(error))
    assert holdings.refused["bad@1"].startswith("The store failed: GET https://a.blob.example/c/m timed out.")


def test_our_own_errors_are_quoted_whole() -> None:
    assert redact.reason(DigestMismatch("The file differs.", "Register it again.")) == "The file differs. Register it again."


@given(st.ip_addresses(v=4), st.integers(1, 65535), st.text("ab /'\"", max_size=20))
def test_no_address_and_no_folder_of_the_cluster_gets_out(address: object, port: int, text: str) -> None:
    said = redact.reason(OSError(f"{text} http://{address}:{port}/x {address}:{port} /home/ann/store/m.safetensors {text}"))
    assert str(address) not in said and "/home" not in said and "m.safetensors" in said


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 3), st.floats(0, 9)), min_size=1), st.data())
def test_what_must_be_here_stays_and_what_answers_goes_last(uses: dict[str, tuple[int, float]], data: st.DataObject) -> None:
    """A busy engine used to refuse the first adapter beyond its places, because nothing was idle."""
    some = st.frozensets(st.sampled_from("abcdef"))
    assigned, live, evict = data.draw(some), data.draw(some), data.draw(st.booleans())
    known = [Use(id, *use) for id, use in uses.items()]
    leaving = to_unload(known, assigned, live, evict)
    may_go = {id for id in uses if id not in (assigned or live) and (evict or id in live)}
    assert leaving is None if not may_go else leaving in may_go
    if leaving is not None and uses[leaving][0]:
        assert all(uses[id][0] for id in may_go), "nothing idle could have gone"


def test_of_several_that_may_go_the_idle_ones_go_first_then_those_that_are_not_live_then_the_longest_idle() -> None:
    a, b, c = Use("a@1", 0, 5.0), Use("b@1", 0, 3.0), Use("c@1", 2, 1.0)
    assert to_unload([a, b, c], {"x@1"}, {"b@1", "c@1"}, evict=True) == "a@1", "not live"
    assert to_unload([a, b, c], {"x@1"}, {"a@1", "b@1", "c@1"}, evict=True) == "b@1", "idle for longer"
    assert to_unload([a, b, c], {"a@1", "b@1"}, {"a@1", "b@1", "c@1"}, evict=True) == "c@1", "though it answers"
    assert to_unload([a, b, c], {"b@1"}, {"b@1"}, evict=False) is None, "pinned versions stay under when_full: refuse"
    assert to_unload([a, b, c], {"b@1"}, {"b@1", "c@1"}, evict=False) == "c@1"
    assert to_unload([a, b], (), {"a@1", "b@1"}, evict=True) is None, "control has not said yet what must be here"


def test_an_adapter_that_makes_room_keeps_its_place_and_takes_no_request_until_it_is_gone_or_wanted_again() -> None:
    holdings = Holdings("m@1", Path("/1"), held={"m@1": "d", "a@1": "e", "b@1": "f"})
    holdings.close("a@1")
    assert list(holdings.held) == ["m@1", "b@1"] and holdings.adapters == ["b@1", "a@1"] and "a@1" in holdings.used
    holdings.reopen("a@1")
    assert holdings.held["a@1"] == "e" and not holdings.closing
    holdings.close("a@1")
    holdings.forget("a@1")
    assert holdings.adapters == ["b@1"] and holdings.revision == 3


def test_control_hears_what_a_version_waits_for_once() -> None:
    holdings = Holdings("m@1", Path("/1"))
    for words in ("the place of a@1", "the place of a@1", ""):
        holdings.wait("b@1", words)
    assert holdings.waiting == {} and holdings.revision == 2
