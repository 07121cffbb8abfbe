"""What is wrong in the vLLM that we pin, put right in the engine's own process until a release does. One function per fault.

vLLM loads this in each of its processes (the entry point ``vllm.general_plugins`` in pyproject.toml). A contract test shows that each
fault is still there: when it fails, delete the function.
"""

from typing import Any


def apply() -> None:
    keep_base_rows_free_of_adapters()


def keep_base_rows_free_of_adapters() -> None:
    """On CPUs, requests without an adapter are answered by the adapter in the last slot, once there is one.

    ``lora/ops/torch_ops/lora_ops.py`` (0.29) indexes the stacked matrices with -1 for rows without an adapter, which in PyTorch is the
    last of them. Here those rows leave the first of the two products as zeros, so the second adds nothing.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    if getattr(lora_ops.bgmv_shrink, "mended", False):
        return
    shrink = lora_ops.bgmv_shrink

    def bgmv_shrink(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs, weights, output, indices, scaling)
        output[indices < 0] = 0

    bgmv_shrink.mended = True  # pyright: ignore[reportFunctionMemberAccess]
    lora_ops.bgmv_shrink = bgmv_shrink
    punica_cpu.bgmv_shrink = bgmv_shrink  # pyright: ignore[reportPrivateImportUsage]
