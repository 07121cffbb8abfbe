"""What is wrong in the vLLM that we pin, put right in the engine's own processes until a release does. One function per fault.

vLLM loads this in each of its processes (the entry point ``vllm.general_plugins`` in pyproject.toml). A contract test shows that each
fault is still there: when that test fails, delete the function.
"""

import asyncio
import contextlib
import copy
import multiprocessing
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast


def apply() -> None:
    multiply_once_per_adapter()
    if multiprocessing.parent_process() is None:  # the engine's front
        look_at_models_here()
        give_long_repetitions_to_guidance()
        return check_grammars_beside_the_loop()
    score_prompts_with_their_own_adapter()  # elsewhere no model runs, and the import would cost 80 MB
    compile_each_grammar_by_its_own_backend()


def look_at_models_here() -> None:
    """Without a GPU, the first start of each architecture on a machine takes seconds more than the next.

    ``_LazyRegisteredModel.inspect_model_cls`` (``model_executor/models/registry.py``, 0.29) lets a process of its own look at the model's class
    so as not to initialize CUDA, and keeps in a file what that finds. The process imports PyTorch and vLLM once more while everything else
    waits. Where there is no CUDA, this process can look by itself.
    """
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        registry._run_in_subprocess = _run_here  # pyright: ignore[reportPrivateUsage]


def _run_here(work: Callable[[], Any]) -> Any:
    return work()


def multiply_once_per_adapter() -> None:
    """On CPUs, the adapter in the last slot answers requests that name no adapter, and every row costs a copy of an adapter's matrices.

    ``lora/ops/torch_ops/lora_ops.py`` (0.29) picks a copy of the matrices for each row. Rows without an adapter have the index -1, which PyTorch
    reads as the last. Example: 32 rows, rank 16 and a vocabulary of 49,152 in bfloat16 are 50 MB that the output layer copies for each step. It
    does so for an adapter that leaves the output layer alone, and for rows of no adapter. With this patch the rows of one adapter are multiplied
    by its matrices in place, and rows of none by nothing: what Punica calls SGMV (Chen et al., 2023, arXiv:2310.18547), by PyTorch's own product.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for product in (bgmv_shrink, bgmv_expand, bgmv_expand_slice):
        for user in (lora_ops, punica_cpu):
            setattr(user, product.__name__, product)
    wrapper: Any = punica_cpu.PunicaWrapperCPU
    if getattr(wrapper.add_lora_linear, "patched", False):
        return
    add = wrapper.add_lora_linear

    def add_lora_linear(self: Any, *given: Any, **named: Any) -> None:
        if not self.no_lora:  # vLLM looks at this too, after it has made the buffers
            add(self, *given, **named)

    add_lora_linear.patched = True  # pyright: ignore[reportFunctionMemberAccess]
    wrapper.add_lora_linear = add_lora_linear


def bgmv_shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
    """``output[row] = scaling * weights[indices[row]] @ inputs[row]``, zero where the index is -1. Shapes: inputs (rows, hidden), weights (slots,
    1, rank, hidden) or (slots, rank, hidden), output (rows, at least rank), indices (rows) or (1), which stands for all rows."""
    output.zero_()
    for slot, rows in _rows_of_each(indices):
        matrix = weights[slot].flatten(end_dim=-2).to(output.dtype)
        output[rows, : len(matrix)] = scaling * (inputs[rows].to(output.dtype) @ matrix.T)


def bgmv_expand(inputs: Any, weights: Any, output: Any, indices: Any, add_inputs: bool = True) -> None:
    """As `bgmv_expand_slice`, into the first columns. The adapter and the model may have padded the vocabulary to different lengths."""
    width = min(weights.shape[-2], output.shape[1])
    bgmv_expand_slice(inputs, weights[..., :width, :], output, indices, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: Any, weights: Any, output: Any, indices: Any, offset: int, width: int, add_inputs: bool = True
) -> None:
    """``output[row, offset : offset + width] += weights[indices[row]] @ inputs[row]``, or ``=`` without ``add_inputs``. Shapes: inputs (rows, rank),
    weights (slots, 1, width, rank) or (slots, width, rank)."""
    columns = slice(offset, offset + width)
    if not add_inputs:
        output[:, columns] = 0
    for slot, rows in _rows_of_each(indices):
        matrix = weights[slot].flatten(end_dim=-2).to(output.dtype)
        output[rows, columns] += inputs[rows].to(output.dtype) @ matrix.T


def _rows_of_each(indices: Any) -> Iterator[tuple[int, Any]]:
    """(slot, its rows) of each adapter in the batch. Example: ``[2, -1, 2]`` gives ``(2, [0, 2])``. The rows of a lone adapter are a slice, which
    copies nothing."""
    slots = set(indices.tolist())
    for slot in slots - {-1}:
        yield slot, slice(None) if len(slots) == 1 else (indices == slot).nonzero().flatten()


def score_prompts_with_their_own_adapter() -> None:
    """On CPUs, a request for ``prompt_logprobs`` (or ``echo`` with ``logprobs``) ends the engine while other requests are in its batch.

    ``_get_prompt_logprobs_dict`` (``v1/worker/gpu_model_runner.py``, 0.29) computes logits for every token of one request's prompt, but the
    adapter indices have one entry per request of the batch. Example: a prompt of 64 tokens in a batch of 2 multiplies 64 rows by 2 indices
    and raises. A prompt of 2 tokens raises nothing and gets its second row from the other request's adapter. This patch lets vLLM score one
    request at a time, with that request's index as the only one.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: Any = GPUModelRunner
    if getattr(runner._get_prompt_logprobs_dict, "patched", False):
        return
    score = runner._get_prompt_logprobs_dict

    def one_by_one(self: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        asked, scored = self.num_prompt_logprobs, dict[str, Any]()
        try:
            for request in [id for id in asked if id in num_scheduled_tokens]:
                self.num_prompt_logprobs = {request: asked[request]}
                with _only_index_of(self, request):
                    scored |= score(self, hidden_states, num_scheduled_tokens)
                if request not in self.num_prompt_logprobs:  # vLLM drops a request whose prompt is done
                    del asked[request]
        finally:
            self.num_prompt_logprobs = asked
        return scored

    one_by_one.patched = True  # pyright: ignore[reportFunctionMemberAccess]
    runner._get_prompt_logprobs_dict = one_by_one


@contextlib.contextmanager
def _only_index_of(runner: Any, request: str) -> Iterator[None]:
    """Let the output layer use the adapter of ``request`` for every row."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if not runner.lora_config:
        yield
        return
    wrappers = runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()
    on_cpu = [wrapper for wrapper in wrappers if isinstance(wrapper, PunicaWrapperCPU)]
    first_token = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[request]])
    before = [(wrapper._sampler_indices, wrapper.indices_len[1]) for wrapper in on_cpu]
    for wrapper in on_cpu:
        wrapper._sampler_indices = wrapper.token_lora_indices[first_token : first_token + 1].clone()
        wrapper.indices_len[1] = 1
    try:
        yield
    finally:
        for wrapper, (indices, length) in zip(on_cpu, before, strict=True):
            wrapper._sampler_indices, wrapper.indices_len[1] = indices, length


def compile_each_grammar_by_its_own_backend() -> None:
    """The backend of an engine's first grammar compiles every later one, whichever backend it was checked for.

    ``StructuredOutputManager.grammar_init`` (``v1/structured_output/__init__.py``, 0.29) keeps one backend, but the front chooses one for each
    request: xgrammar, or guidance for what xgrammar does not know. Example: the choice ``["a\\nb"]`` is checked by guidance. Where the engine
    has xgrammar already, the answer is an error 500. With this patch there is one manager for each backend.
    """
    from vllm.v1.structured_output import StructuredOutputManager

    manager: Any = StructuredOutputManager
    if getattr(manager.grammar_init, "patched", False):
        return
    init = manager.grammar_init

    def grammar_init(self: Any, request: Any) -> None:
        if request.structured_output_request is None:
            return
        managers = self.__dict__.setdefault("managers", {})
        name = request.sampling_params.structured_outputs._backend
        if name not in managers:
            managers[name] = copy.copy(self)
            managers[name].backend = None
        init(managers[name], request)
        self.backend = managers[name].backend  # allocates the mask, which is the same for all

    grammar_init.patched = True  # pyright: ignore[reportFunctionMemberAccess]
    manager.grammar_init = grammar_init


LONG_REPETITION = re.compile(r"[{,]\s*0*(?:129|1[3-9]\d|[2-9]\d\d|[1-9]\d{3,})\s*[,}]")


def give_long_repetitions_to_guidance() -> None:
    """A schema's pattern that repeats more than 128 times is checked by xgrammar, and then fails in the engine: an error 400 without a reason.

    Example: ``^[a-z]{1,255}$``, which Pydantic and Zod users write. xgrammar 0.2.8 loses what such a repetition refers to
    (mlc-ai/xgrammar#863; mended in 0.2.9). vLLM gives guidance what ``has_xgrammar_unsupported_json_features``
    (``v1/structured_output/backend_xgrammar.py``, 0.29) finds in a schema. With this patch it finds these patterns too.
    """
    from vllm.v1.structured_output import backend_xgrammar

    backend: Any = backend_xgrammar
    if getattr(backend.has_xgrammar_unsupported_json_features, "patched", False):
        return
    unsupported = backend.has_xgrammar_unsupported_json_features

    def has_unsupported(schema: Any) -> bool:
        return unsupported(schema) or repeats_often(schema)

    has_unsupported.patched = True  # pyright: ignore[reportFunctionMemberAccess]
    backend.has_xgrammar_unsupported_json_features = has_unsupported


def repeats_often(schema: Any) -> bool:
    """
    >>> repeats_often({"items": [{"pattern": "^a{1,255}$"}]}), repeats_often({"pattern": "^a{1,128}$"}), repeats_often({"pattern": {}})
    (True, False, False)
    """
    left = [schema]
    while left:
        one = left.pop()
        if isinstance(one, dict) and isinstance(pattern := one.get("pattern"), str) and LONG_REPETITION.search(pattern):
            return True
        left += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return False


def check_grammars_beside_the_loop() -> None:
    """A request's grammar is checked in the event loop that serves everybody's tokens, and a regular expression may take five seconds.

    ``AsyncLLM.add_request`` (``v1/engine/async_llm.py``, 0.29) calls ``SamplingParams.verify`` there. This patch has the grammar checked in a
    thread before, so that a slow one holds up other grammars and nothing else.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    front, parameters = cast(Any, AsyncLLM), cast(Any, SamplingParams)
    if getattr(front.add_request, "patched", False):
        return
    add, validate = front.add_request, parameters._validate_structured_outputs
    checks = ThreadPoolExecutor(1, "grammars")

    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, *more: Any, **named: Any) -> Any:
        if getattr(params, "structured_outputs", None) is not None:
            own = self.input_processor
            arguments = own.model_config, own.structured_outputs_config, own.tokenizer
            await asyncio.get_running_loop().run_in_executor(checks, validate, params, *arguments)
            params.grammar_checked = True
        return await add(self, request_id, prompt, params, *more, **named)

    def once(params: Any, *arguments: Any) -> None:
        if not getattr(params, "grammar_checked", False):
            validate(params, *arguments)

    add_request.patched = True  # pyright: ignore[reportFunctionMemberAccess]
    front.add_request, parameters._validate_structured_outputs = add_request, once
