"""What `deployments.replica.launch` and `deployments.replica.engine` call in vLLM 0.29.
Read from the sources, because importing vLLM takes ten seconds."""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

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


def test_only_the_engine_imports_vllm() -> None:
    root = Path(__file__).parents[2]
    users = [p for folder in ("cluster", "deployments") for p in (root / folder).rglob("*.py") if imports(p, "vllm")]
    assert sorted(p.name for p in users) == ["engine.py", "fingerprint.py", "launch.py", "vllm_patches.py"]


def test_rays_and_serves_private_parts_have_one_file_each() -> None:
    root = Path(__file__).parents[2]
    files = [p for folder in ("cluster", "deployments", "jobs") for p in (root / folder).rglob("*.py")]
    private = {p.name for p in files for name in ("ray.serve._private", "ray._private", "ray._raylet") if imports(p, name)}
    assert private == {"ray_patches.py", "lease.py"}


def imports(path: Path, module: str) -> bool:
    tree = ast.parse(path.read_text())
    named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return any(name == module or name.startswith(module + ".") for name in named)


def test_packed_copies_are_where_the_fingerprint_looks() -> None:
    """`deployments.replica.fingerprint.repack` packs again what a reload forgets; without these names it would forget as well."""
    packing = (VLLM / "model_executor/layers/utils.py").read_text()
    assert "def dispatch_cpu_unquantized_gemm(\n    layer: torch.nn.Module,\n    remove_weight: bool," in packing
    assert "layer.cpu_linear = lambda x, weight, bias:" in packing
    embedding = (VLLM / "model_executor/layers/vocab_parallel_embedding.py").read_text()
    assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=False)" in embedding
    assert "layer.weight = embed_tokens.weight" in embedding, "a tied output layer shares the matrix and not its packed copy"


def base_row(shrink: Any) -> float:
    """What a row without an adapter (index -1) gets from two slots of which the last is taken."""
    import torch

    inputs, slots, output = torch.ones(1, 4), torch.stack([torch.zeros(2, 4), torch.ones(2, 4)]), torch.zeros(1, 2)
    shrink(inputs, slots, output, torch.tensor([-1]))
    return float(output.abs().sum())


def test_rows_without_an_adapter_stay_free_of_adapters() -> None:
    """The first half fails when vLLM has mended it itself; then `deployments.vllm_patches` can lose the function."""
    from vllm.lora.ops.torch_ops import lora_ops

    from deployments.vllm_patches import apply

    assert base_row(lora_ops.bgmv_shrink) > 0, "vLLM's own is still wrong"
    apply()
    apply()
    wrapper: Any = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu")
    assert base_row(lora_ops.bgmv_shrink) == base_row(wrapper.bgmv_shrink) == 0


def test_the_engine_tells_its_load_to_a_logger_with_these_methods() -> None:
    from deployments.replica.load import EngineLoad

    loggers = ast.parse((VLLM / "v1/metrics/loggers.py").read_text())
    base = next(node for node in loggers.body if isinstance(node, ast.ClassDef) and node.name == "StatLoggerBase")
    methods = {
        node.name: [argument.arg for argument in node.args.args] for node in base.body if isinstance(node, ast.FunctionDef)
    }
    assert methods["record"] == ["self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"]
    assert set(methods) - {"__init__"} <= set(dir(EngineLoad))
    stats = (VLLM / "v1/metrics/stats.py").read_text()
    for field in ("num_running_reqs", "num_waiting_reqs", "kv_cache_usage", "time_to_first_tokens_iter"):
        assert f"self.{field}" in stats or f"    {field}:" in stats
