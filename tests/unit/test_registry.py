"""Versions and aliases: what is written is complete, immutable and checked; concurrent writers never share a number."""

import json
import resource
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from pydantic import ValidationError

from cluster.errors import BadRequest, Conflict, DigestMismatch, ModelNotFound, StoreUnavailable, VersionRefused
from cluster.store import fitting
from cluster.store.artefact import stated_ranks
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import File, Lineage, VersionId


def weights(folder: Path, content: bytes = b"tensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(Store((tmp_path / "store").as_uri()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return weights(tmp_path / "source")


def test_versions_count_from_one_and_read_back(registry: Registry, source: Path) -> None:
    first = registry.register("m", "weights", None, source, Lineage(metrics={"loss": 1.5}))
    second = registry.register("m", "weights", None, source, Lineage(parent=first.id))
    assert [str(m.id) for m in registry.versions("m")] == ["m@1", "m@2"]
    assert registry.manifest(second.id) == second
    assert second.lineage.parent == first.id


def test_the_same_files_have_the_same_digest(registry: Registry, source: Path) -> None:
    first = registry.register("m", "weights", None, source, Lineage())
    assert registry.register("m", "weights", None, source, Lineage()).digest == first.digest
    weights(source, b"other")
    assert registry.register("m", "weights", None, source, Lineage()).digest != first.digest


def test_a_version_without_a_manifest_does_not_exist(registry: Registry, source: Path) -> None:
    registry.store.put_new("versions/m/1/claim", b"")
    registry.store.put_new("versions/m/1/files/config.json", b"{}")
    assert registry.versions("m") == []
    assert str(registry.register("m", "weights", None, source, Lineage()).id) == "m@2"


def test_concurrent_publishers_never_share_a_number(registry: Registry, source: Path) -> None:
    made: list[VersionId] = []
    threads = [
        threading.Thread(target=lambda: made.append(registry.register("m", "weights", None, source, Lineage()).id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(id.n for id in made) == list(range(1, 9))


@pytest.mark.parametrize("bad", ["../x", "a/b", ".hidden", "a..b", "", "a" * 64, "a b", "a@1", "é", "a\n"])
def test_names_that_could_leave_their_folder_are_refused(registry: Registry, source: Path, bad: str) -> None:
    with pytest.raises(BadRequest):
        registry.register(bad, "weights", None, source, Lineage())


@given(st.text(max_size=80))
def test_any_text_is_a_version_or_a_bad_request(text: str) -> None:
    try:
        id = VersionId.parse(text)
    except BadRequest:
        return
    assert str(id) == text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pytorch_model.bin", "run code"),
        ("adapter.pt", "run code"),
        ("modeling.py", "run code"),
        ("x.pkl", "run code"),
        ("X.BIN", "run code"),
        ("x.gguf", "run code"),
        ("X.BIN", "run code"),
        ("x.gguf", "run code"),
    ],
)
def test_files_that_could_run_code_are_refused(registry: Registry, source: Path, name: str, why: str) -> None:
    (source / name).write_bytes(b"")
    with pytest.raises(VersionRefused, match=why):
        registry.register("m", "weights", None, source, Lineage())
    assert registry.names() == []


def test_links_and_remote_code_are_refused(registry: Registry, source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(VersionRefused, match="auto_map"):
        registry.register("m", "weights", None, source, Lineage())
    weights(source)
    (source / "link.json").symlink_to("/etc/passwd")
    with pytest.raises(VersionRefused, match="symbolic link"):
        registry.register("m", "weights", None, source, Lineage())


def test_a_version_that_would_make_vllm_load_another_model_is_refused(registry: Registry, source: Path) -> None:
    """At admission; and where an older release has admitted it, before an engine starts over it."""
    verifier = {"verifier": {"name_or_path": "/etc"}, "proposal_methods": [{"speculative_tokens": 3}]}
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "speculators_config": verifier}))
    for refuse in (
        lambda: registry.register("m", "weights", None, source, Lineage()),
        lambda: fitting.of_folder(source),
    ):
        with pytest.raises(VersionRefused, match=r"names another model .*speculators_config"):
            refuse()
    assert registry.names() == []


def test_a_folder_that_is_not_a_model_says_what_is_missing(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(VersionRefused, match=r"config\.json"):
        registry.register("m", "weights", None, tmp_path / "empty", Lineage())


def test_an_adapter_needs_a_base_that_exists(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q_proj": 32}}')
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    assert max(stated_ranks(folder)) == 32
    with pytest.raises(VersionRefused, match="needs base"):
        registry.register("a", "adapter", None, folder, Lineage())
    with pytest.raises(ModelNotFound):
        registry.register("a", "adapter", VersionId("m", 1), folder, Lineage())


def test_a_changed_file_is_found_before_it_is_served(registry: Registry, source: Path, tmp_path: Path) -> None:
    manifest = registry.register("m", "weights", None, source, Lineage())
    folder = registry.fetch(manifest, tmp_path / "cache")
    (folder / "model.safetensors").write_bytes(b"tensorz")
    with pytest.raises(DigestMismatch, match=r"model\.safetensors"):
        registry.fetch(manifest, tmp_path / "cache")


def test_an_alias_moves_forward_and_rollback_is_a_new_generation(registry: Registry, source: Path) -> None:
    one, two = (registry.register("m", "weights", None, weights(source, bytes([n])), Lineage()).id for n in (1, 2))
    registry.move("m", one, "first", "me", after=0)
    registry.move("m", two, "better", "me", after=1)
    assert registry.previous("m") == one
    registry.move("m", one, "back", "me", after=2)
    with pytest.raises(Conflict, match="nothing to roll back to"):
        registry.previous("m")
    assert [str(move.stable) for move in registry.history("m")] == ["m@1", "m@2", "m@1"]
    assert registry.aliases()["m"].generation == 3


def test_of_two_moves_at_once_one_wins_and_the_other_is_told(registry: Registry, source: Path) -> None:
    one = registry.register("m", "weights", None, source, Lineage()).id
    registry.move("m", one, "first", "me", after=0)
    with pytest.raises(Conflict):
        registry.move("m", one, "also first", "you", after=0)


def test_an_alias_cannot_point_at_what_does_not_exist(registry: Registry) -> None:
    with pytest.raises(ModelNotFound):
        registry.move("m", VersionId("m", 1), "first", "me", after=0)


class Aliases(RuleBasedStateMachine):
    """Any interleaving of moves by writers with stale knowledge leaves one gapless history that ends where the last winner said."""

    versions = Bundle("versions")

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.registry = Registry(Store((root / "store").as_uri()))
        self.source = weights(root / "source")
        self.model: list[VersionId] = []

    @rule(target=versions)
    def register(self) -> VersionId:
        return self.registry.register("m", "weights", None, self.source, Lineage()).id

    @rule(version=versions, behind=st.integers(0, 2))
    def move(self, version: VersionId, behind: int) -> None:
        after = max(0, len(self.model) - behind)
        try:
            self.registry.move("m", version, "r", "a", after)
        except Conflict:
            assert after < len(self.model)
        else:
            assert after == len(self.model)
            self.model.append(version)

    @invariant()
    def history_is_the_model(self) -> None:
        assert [move.stable for move in self.registry.history("m")] == self.model

    def teardown(self) -> None:
        self.folder.cleanup()


TestAliases = Aliases.TestCase
TestAliases.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


def test_rolling_back_twice_goes_back_two_versions(registry: Registry, source: Path) -> None:
    one, two, three = (registry.register("m", "weights", None, source, Lineage()).id for _ in range(3))
    for after, id in enumerate((one, two, three, two)):
        registry.move("m", id, "", "me", after)
    assert registry.previous("m") == one
    registry.move("m", three, "again", "me", after=4)
    assert registry.previous("m") == two


def test_what_a_downloader_noted_in_hidden_folders_is_left_out(registry: Registry, source: Path) -> None:
    notes = source / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "model.safetensors.lock").write_bytes(b"")
    made = registry.register("m", "weights", None, source, Lineage())
    assert {file.path for file in made.files} == {"config.json", "model.safetensors"}


def test_a_damaged_manifest_is_refused_with_words_and_keeps_no_replica_from_starting(registry: Registry, source: Path) -> None:
    made = registry.register("m", "weights", None, source, Lineage())
    registry.move("m", made.id, "", "me", after=0)
    assert registry.store.local_root
    (registry.store.local_root / "versions/m/1/manifest.json").write_text("{")
    fresh = Registry(registry.store)
    with pytest.raises(VersionRefused, match="damaged"):
        fresh.manifest(made.id)
    assert fresh.resident_adapters(made.id, 4) == []


@pytest.mark.parametrize("text", ["[]", "{}", '{"r": null}', '{"r": 8, "rank_pattern": {"q": "many"}}'])
def test_an_adapter_configuration_without_a_rank_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(VersionRefused):
        stated_ranks(tmp_path)


def test_a_disk_that_fills_up_in_the_middle_leaves_no_files_and_no_version(registry: Registry, source: Path) -> None:
    """P14, on a disk that really refuses: no file of this process may grow beyond the limit for a moment."""
    before = registry.register("m", "weights", None, source, Lineage())
    (source / "model.safetensors").write_bytes(b"x" * 3_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(StoreUnavailable, match="cannot be used"):
            registry.register("m", "weights", None, source, Lineage())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert registry.store.local_root
    left = [path for path in (registry.store.local_root / "versions/m/2").rglob("*") if path.is_file() and path.name != "claim"]
    assert left == [] and [manifest.id for manifest in registry.versions("m")] == [before.id]
    assert registry.register("m", "weights", None, source, Lineage()).id.n == 3


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../other", "a/../../b", "a//b", "./a", "a\\b"])
def test_a_manifest_names_no_path_outside_its_folder(path: str) -> None:
    with pytest.raises(ValidationError, match="inside a version"):
        File(path=path, sha256="0" * 64, size_bytes=1)


def test_a_name_that_no_alias_can_have_keeps_no_replica_from_starting(registry: Registry, source: Path) -> None:
    """A file that a copy left behind under ``aliases/`` used to be a `BadRequest` for whoever asked for all aliases."""
    made = registry.register("m", "weights", None, source, Lineage())
    registry.move("m", made.id, "first", "test", after=0)
    registry.store.put_new("aliases/m (copy)/00000001.json", b"{}")
    registry.store.put_new("versions/.hidden/1/manifest.json", b"{}")
    assert registry.resident_adapters(made.id, 4) == [] and set(registry.aliases()) == {"m"}
    assert registry.catalog.names() == ["m"]
