"""Nothing outside the files that are named for it touches what Ray 2.60 and vLLM 0.29 keep private. See `benchmarks.touches`."""

from pathlib import Path

import pytest

from benchmarks.touches import DOCUMENTED, NAMED, hidden_imports, touches

ROOT = Path(__file__).parents[2]


def test_private_names_are_touched_in_named_files_only() -> None:
    assert [str(touch) for touch in touches(ROOT, NAMED)] == []


def test_no_module_is_imported_by_a_string() -> None:
    """Such an import is one that no contract sees: cluster/surge.py once built the graph by one, which closed a circle."""
    assert [str(touch) for touch in hidden_imports(ROOT)] == []


def test_the_one_hook_that_is_taken_for_public_is_documented() -> None:
    """deployments/gateway.py: ``serve.ingress()`` without an application asks the class to define it."""
    from ray import serve

    assert all(hook in (serve.ingress.__doc__ or "") for hook in DOCUMENTED)


@pytest.mark.parametrize("file", NAMED)
def test_a_file_that_touches_private_names_says_so_and_has_a_contract_test(file: str) -> None:
    if not (ROOT / file).exists():
        pytest.skip("not moved yet")
    tests = [path.read_text() for path in (ROOT / "tests/contract").glob("*.py") if path.name != Path(__file__).name]
    module = file.removesuffix(".py").replace("/", ".")
    assert any(file in text or module in text for text in tests)
    assert any(release in (ROOT / file).read_text() for release in ("2.60", "0.29"))


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import ray._private.state", "import of ray._private.state"),
        ("from ray.serve import _private", "import of ray.serve._private"),
        ("from ray.train.v2._internal.execution import x", "import of ray.train.v2._internal.execution.x"),
        ("from ray.core.generated.gcs_pb2 import Y", "import of ray.core.generated.gcs_pb2.Y"),
        ("def f():\n    from vllm.v1 import engine", "import of vllm.v1.engine"),
        ("serve.delete(app, _blocking=False)", "_blocking=…"),
        ("handle._router.stop()", "handle._router"),
        ("getattr(handle, '_router')", "getattr(handle, '_router')"),
        ("class G:\n    def __ray_terminate__(self): ...", "def __ray_terminate__"),
        ("class G:\n    def __serve_build_asgi_app__(self): ...", ""),
        ("class T(Config):\n    def backend_cls(self): ...", "def backend_cls"),
        ("load('ray.serve._private.api')", "'ray.serve._private.api' in a string"),
        ("class A:\n    def f(self): return self._own + point._replace(x=1)._asdict()", ""),
        ("import ray.serve.schema\nfrom ray import serve", ""),
        ('"""ray.serve._private is private."""', ""),
    ],
)
def test_a_touch_is_found_however_it_is_spelt(tmp_path: Path, code: str, found: str) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/a.py").write_text(code)
    assert [touch.what for touch in touches(tmp_path)] == ([found] if found else [])


@pytest.mark.parametrize(
    "code", ["import_module('deployments.app')", "importlib.import_module(name)", "x = 'deployments.app:build'"]
)
def test_an_import_by_a_string_is_found(tmp_path: Path, code: str) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/a.py").write_text(code)
    assert len(hidden_imports(tmp_path)) == 1
