"""What `deployments.fleet` calls in vLLM 0.29. Read from the sources, because importing vLLM takes ten seconds."""

import ast
import importlib.util
from pathlib import Path

import pytest

VLLM = Path(importlib.util.find_spec("vllm").origin).parent  # pyright: ignore

USED = {
    "engine/arg_utils.py": {"AsyncEngineArgs"},
    "entrypoints/launchers/api_server/app_state.py": {"init_app_state"},
    "entrypoints/launchers/app.py": {"build_app"},
    "entrypoints/launchers/cli_args.py": {"make_arg_parser"},
    "entrypoints/serve/engine/protocol.py": {"ErrorResponse"},
    "entrypoints/serve/lora/protocol.py": {"LoadLoRAAdapterRequest"},
    "usage/usage_lib.py": {"UsageContext"},
    "v1/engine/async_llm.py": {"AsyncLLM"},
}


@pytest.mark.parametrize("file", USED)
def test_what_the_replica_imports_is_where_it_was(file: str) -> None:
    tree = ast.parse((VLLM / file).read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
    assert USED[file] <= defined


def test_adapters_are_loaded_by_the_name_that_requests_use() -> None:
    source = (VLLM / "entrypoints/openai/models/serving.py").read_text()
    assert "async def load_lora_adapter" in source and "self.lora_requests[lora_name] = lora_request" in source


def test_only_the_replica_imports_vllm() -> None:
    root = Path(__file__).parents[2]
    users = [p for folder in ("cluster", "deployments") for p in (root / folder).rglob("*.py") if imports(p, "vllm")]
    assert [p.name for p in users] == ["fleet.py"]


def test_rays_and_serves_private_parts_have_one_file_each() -> None:
    root = Path(__file__).parents[2]
    files = [p for folder in ("cluster", "deployments", "jobs") for p in (root / folder).rglob("*.py")]
    private = {p.name for p in files for name in ("ray.serve._private", "ray._private", "ray._raylet") if imports(p, name)}
    assert private == {"seal.py"}


def imports(path: Path, module: str) -> bool:
    tree = ast.parse(path.read_text())
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(name == module or name.startswith(module + ".") for name in named)
