"""What `deployments.replica.launch`, `deployments.replica.arguments` and `deployments.replica.vllm_engine` call in vLLM 0.29.
Read from the sources, because importing vLLM takes ten seconds."""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from cluster.pool.local import SERVING_ENVIRONMENT
from deployments import vllm_patches
from deployments.routing.engine_routes import ENGINE_ROUTES

VLLM = Path(importlib.util.find_spec("vllm").origin).parent  # pyright: ignore

USED = {
    "engine/arg_utils.py": {"AsyncEngineArgs"},
    "entrypoints/launchers/api_server/app_state.py": {"init_app_state"},
    "entrypoints/launchers/app.py": {"build_app"},
    "entrypoints/launchers/cli_args.py": {"FrontendArgs", "make_arg_parser", "validate_parsed_serve_args"},
    "entrypoints/launchers/launcher.py": {"validate_api_server_args"},
    "entrypoints/openai/models/protocol.py": {"BaseModelPath"},
    "entrypoints/serve/engine/protocol.py": {"ErrorResponse"},
    "entrypoints/serve/lora/protocol.py": {"LoadLoRAAdapterRequest", "UnloadLoRAAdapterRequest"},
    "usage/usage_lib.py": {"UsageContext"},
    "v1/engine/async_llm.py": {"AsyncLLM"},
}


@pytest.mark.parametrize("file", USED)
def test_what_the_replica_imports_is_where_it_was(file: str) -> None:
    tree = ast.parse((VLLM / file).read_text())
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
    assert USED[file] <= defined


@pytest.mark.parametrize("path", ENGINE_ROUTES)
def test_every_route_of_the_gateway_is_one_of_the_engines(path: str) -> None:
    assert any(f'"{path}"' in file.read_text() for file in (VLLM / "entrypoints").rglob("api_router.py"))


def test_streams_end_as_the_table_of_routes_says() -> None:
    messages = (VLLM / "entrypoints/anthropic/serving.py").read_text()
    assert 'return f"event: {event}\\ndata: {data}\\n\\n"' in messages
    assert 'wrap_data_with_event(data, "message_stop")' in messages
    responses = (VLLM / "entrypoints/openai/responses/api_router.py").read_text()
    assert 'f"event: {event_type}\\ndata: "' in responses
    served = (VLLM / "entrypoints/openai/responses/serving.py").read_text()
    assert served.count("ResponseCompletedEvent(") == 1 and 'type="response.completed"' in served
    for other in ("incomplete", "failed", "cancelled"):  # OpenAI's own API has these ends too
        assert f"response.{other}" not in served, "the table of routes needs one more terminator"


def test_adapters_are_loaded_by_the_name_that_requests_use() -> None:
    source = (VLLM / "entrypoints/openai/models/serving.py").read_text()
    assert "async def load_lora_adapter" in source and "self.lora_requests[lora_name] = lora_request" in source


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
    """The first half fails when vLLM has mended it itself; then `deployments.vllm_patches` can lose the functions."""
    from vllm.lora.ops.torch_ops import lora_ops

    from deployments.vllm_patches import multiply_once_per_adapter as apply

    own = vllms_own_products()
    assert base_row(own["bgmv_shrink"]) > 0, "vLLM's own is still wrong"
    apply()
    apply()
    wrapper: Any = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu")
    assert base_row(lora_ops.bgmv_shrink) == base_row(wrapper.bgmv_shrink) == 0
    source = (VLLM / "lora/punica_wrapper/punica_cpu.py").read_text()
    assert source.count("if self.no_lora:\n            return") == 3, "a batch of no adapter is told by this"
    assert "is_prefill=True" in (VLLM / "v1/worker/lora_model_runner_mixin.py").read_text(), (
        "which vLLM finds out for prefills alone"
    )
    for name in own:
        assert getattr(lora_ops, name) is getattr(wrapper, name) is getattr(vllm_patches, name)


def vllms_own_products() -> dict[str, Any]:
    """As they are in the sources, whatever has been patched in this process."""
    names = dict[str, Any]()
    exec((VLLM / "lora/ops/torch_ops/lora_ops.py").read_text(), names)
    return {name: names[name] for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")}


@pytest.mark.parametrize("indices", [[0, 1, 1, 2], [2, 2, 2, 2], [1], [0, -1, 2, -1], [-1, -1, -1, -1], [-1]])
@pytest.mark.parametrize("stacked", [True, False], ids=["four dimensions", "three dimensions"])
def test_products_by_adapter_are_vllms_own_but_for_rows_of_no_adapter(indices: list[int], stacked: bool) -> None:
    import torch

    own, generator = vllms_own_products(), torch.Generator().manual_seed(0)

    def some(*shape: int) -> Any:
        drawn = torch.randn(*shape, generator=generator)
        return drawn if stacked or len(shape) < 4 else drawn[:, 0]

    a, b, inputs, slots = some(3, 1, 8, 16), some(3, 1, 24, 8), some(4, 16), torch.tensor(indices)
    ours, theirs = torch.ones(4, 8), torch.ones(4, 8)
    vllm_patches.bgmv_shrink(inputs, a, ours, slots, 0.5)
    own["bgmv_shrink"](inputs, a, theirs, slots, 0.5)
    theirs[(slots < 0).expand(4)] = 0
    torch.testing.assert_close(ours, theirs)
    for add in (True, False):
        for name, columns, where in (("bgmv_expand_slice", 40, (10, 24)), ("bgmv_expand", 30, ()), ("bgmv_expand", 20, ())):
            before = some(4, columns)
            one, other = before.clone(), before.clone()
            getattr(vllm_patches, name)(ours, b, one, slots, *where, add)
            own[name](ours, b, other, slots, *where, add)
            torch.testing.assert_close(one, other)


def test_what_a_model_can_is_looked_up_by_another_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fault that `deployments.vllm_patches.look_at_models_here` is there for."""
    from vllm.model_executor.models import registry

    from deployments.vllm_patches import look_at_models_here

    def refuse(_: Any) -> None:
        raise InterruptedError("another process would start")

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(registry, "_run_in_subprocess", refuse)
    model: Any = registry.ModelRegistry.models["LlamaForCausalLM"]
    with pytest.raises(InterruptedError):
        model.inspect_model_cls()
    look_at_models_here()
    assert model.inspect_model_cls().architecture == "LlamaForCausalLM"


def test_one_index_may_stand_for_every_row() -> None:
    """The output layer scores a prompt with one index for all its tokens. A patch of ours that expected one for each token ended the engine
    at the first request for prompt_logprobs."""
    from vllm.lora.ops.torch_ops import lora_ops

    from deployments.vllm_patches import multiply_once_per_adapter

    multiply_once_per_adapter()
    assert [scored(lora_ops.bgmv_shrink, rows=5, indices=[slot]) for slot in (-1, 1)] == [0.0, 40.0]
    assert scored(lora_ops.bgmv_shrink, rows=2, indices=[-1, 1]) == 8.0


def scored(shrink: Any, rows: int, indices: list[int]) -> float:
    """The sum over what ``rows`` of ones get from an empty slot and a slot of ones."""
    import torch

    slots, output = torch.stack([torch.zeros(2, 4), torch.ones(2, 4)]), torch.zeros(rows, 2)
    shrink(torch.ones(rows, 4), slots, output, torch.tensor(indices))
    return float(output.sum())


def test_vllm_scores_a_prompt_with_the_indices_of_the_whole_batch() -> None:
    """The fault that `deployments.vllm_patches.score_prompts_with_their_own_adapter` is there for. Where this fails, vLLM may have mended it:
    look, and delete the function. `tests.cluster.test_engine` shows on a real engine that the patch works."""
    logits = (VLLM / "lora/punica_wrapper/punica_cpu.py").read_text().split("def add_lora_logits")[1]
    assert "bgmv_shrink(x, lora_a_stacked, buffer, self.sampler_indices, scale)" in logits
    runner = (VLLM / "v1/worker/gpu_model_runner.py").read_text().split("def _get_prompt_logprobs_dict")[1]
    assert "logits = self.model.compute_logits(prompt_hidden_states)" in runner
    assert "for req_id, num_prompt_logprobs in num_prompt_logprobs_dict.items()" in runner
    assert "del num_prompt_logprobs_dict[req_id]" in runner
    base = (VLLM / "lora/punica_wrapper/punica_base.py").read_text()
    assert "sampler_indices_len = self.indices_len[1]" in base and "return self._sampler_indices[:sampler_indices_len]" in base
    assert "self.punica_wrapper_mapping: dict[str, PunicaWrapperBase]" in (VLLM / "lora/model_manager.py").read_text()


def test_a_dead_engine_is_said_in_the_words_that_the_gateway_knows() -> None:
    from deployments.routing.engine_errors import DEAD, NO_ANSWER

    assert f'ENGINE_DEAD_MESSAGE = "{DEAD}' in (VLLM / "v1/engine/exceptions.py").read_text()
    assert f'raise GenerationError("{NO_ANSWER}")' in (VLLM / "entrypoints/generate/base/serving.py").read_text()


def test_the_first_grammars_backend_compiles_all_others() -> None:
    """The fault that `deployments.vllm_patches.compile_each_grammar_by_its_own_backend` is there for."""
    manager = (VLLM / "v1/structured_output/__init__.py").read_text()
    assert "if self.backend is None:" in manager and "_backend" in manager
    assert "grammar = self.executor.submit(self._create_grammar, request)" in manager
    assert 'self.structured_outputs._backend = "guidance"' in (VLLM / "sampling_params.py").read_text()


def test_guidance_gets_what_a_function_of_this_name_finds_in_a_schema() -> None:
    """`deployments.vllm_patches.give_long_repetitions_to_guidance` extends it; `tests.contract.test_xgrammar` shows the fault."""
    backend = (VLLM / "v1/structured_output/backend_xgrammar.py").read_text()
    assert "        if has_xgrammar_unsupported_json_features(schema):\n            raise VLLMValidationError(" in backend
    parameters = (VLLM / "sampling_params.py").read_text()
    assert "from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar" in parameters
    assert "            except VLLMValidationError:\n                # The request either failed validation" in parameters


def test_a_variable_bounds_the_compiled_grammars_that_an_engine_keeps() -> None:
    """An engine would keep half a gigabyte of them."""
    assert (
        "cache_limit_bytes=vllm.envs.VLLM_XGRAMMAR_CACHE_MB * 1024"
        in (VLLM / "v1/structured_output/backend_xgrammar.py").read_text()
    )
    assert 'os.getenv("VLLM_XGRAMMAR_CACHE_MB", "512")' in (VLLM / "envs.py").read_text()
    assert int(SERVING_ENVIRONMENT["VLLM_XGRAMMAR_CACHE_MB"]) < 512


def test_grammars_are_checked_in_the_loop_that_serves_tokens() -> None:
    """The fault that `deployments.vllm_patches.check_grammars_beside_the_loop` is there for."""
    front = (VLLM / "v1/engine/async_llm.py").read_text().split("async def add_request")[1]
    assert "request = self.input_processor.process_inputs(" in front
    parameters = (VLLM / "sampling_params.py").read_text()
    assert (
        "        self._validate_structured_outputs(\n            model_config, structured_outputs_config, tokenizer\n        )"
        in parameters
    )
    assert "params.verify(\n" in (VLLM / "v1/engine/input_processor.py").read_text()


@pytest.mark.parametrize(
    ("file", "lines"),
    [
        ("entrypoints/openai/chat_completion/protocol.py", ["else structured_outputs_kwargs.get(k)", 'if tool["function"]["name"] == function_name']),
        ("v1/sample/sampler.py", ["logprobs_tensors = logprob_token_ids_tensors"]),
        ("v1/core/sched/utils.py", ["for pattern_len in range("]),
        ("sampling_params.py", ["for bad_word in self.bad_words:", "prompt_token_ids = tokenizer.encode("]),
        ("sampling_params.py", ["skip_guidance = has_guidance_unsupported_json_features(schema)"]),
    ],
)  # fmt: skip
def test_what_the_gateway_refuses_is_still_wrong_in_vllm(file: str, lines: list[str]) -> None:
    """Where this fails, look into `deployments.api.engine_limits`: one of its functions may have lost its reason."""
    source = (VLLM / file).read_text()
    assert [line for line in lines if line not in source] == []


def test_vllms_error_handler_asks_the_application_for_its_server() -> None:
    """`deployments.replica.launch.Unstoppable` is that server; without one a client read of an attribute that is missing."""
    handler = (VLLM / "entrypoints/serve/exception_handling/handlers/vllm_error.py").read_text()
    assert "server=req.app.state.server" in handler
    assert "server.should_exit = True" in (VLLM / "entrypoints/launchers/launcher.py").read_text()


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


@pytest.mark.parametrize(
    ("file", "words"),
    [("v1/engine/core.py", "EngineCore failed to start."), ("v1/executor/multiproc_executor.py", "WorkerProc failed to start.")],
)
def test_a_process_that_fails_to_start_logs_its_exception_after_our_plugins_were_loaded(file: str, words: str) -> None:
    """`deployments.replica.last_words` takes the exception from the log record."""
    assert f'logger.exception("{words}")' in (VLLM / file).read_text()
    core = (VLLM / "v1/engine/core.py").read_text()
    begins = core.index("class EngineCore:")
    assert core.index("load_general_plugins()", begins) < core.index("self.model_executor = executor_class", begins)
    assert "load_general_plugins()" in (VLLM / "v1/worker/worker_base.py").read_text()


def test_a_failed_process_is_named_with_its_exit_status() -> None:
    assert 'f"Failed core proc(s): {finished}"' in (VLLM / "v1/engine/utils.py").read_text()


def test_the_front_learns_how_large_the_kv_cache_became() -> None:
    client = (VLLM / "v1/engine/core_client.py").read_text()
    assert "cache_config.kv_cache_size_tokens = (" in client and "vllm_config.model_config.max_model_len = min(" in client
