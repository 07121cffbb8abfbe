"""Runs in vLLM's worker: reads other weights in, and computes a checksum of the weights in the accelerator's memory.

vLLM mixes this class into its worker (``worker_extension_cls``), so that `deployments.replica.vllm_engine` can call its methods by name.
"""

from collections.abc import Iterator
from typing import Any

CHUNK = 1 << 24
PRIME = 65_521
WIDTHS = ("input_size_per_partition", "input_size", "embedding_dim")
"""Attributes in which vLLM's layers say how wide their input is. A layer without any of them has no part in the fingerprint."""


class Fingerprint:
    """Mixed into vLLM's worker; ``model_runner`` and ``reload_weights`` are the worker's."""

    model_runner: Any
    reload_weights: Any

    def take_over(self, folder: str) -> str:
        """Read the weights in ``folder`` over those in memory; returns their fingerprint."""
        self.reload_weights(weights_path=folder)
        repack(self.model_runner.get_model())
        return self.fingerprint()

    def fingerprint(self) -> str:
        """Depends on every parameter's name, shape and bits; the same on every replica that loaded the same files."""
        import hashlib

        digest = hashlib.sha256()
        for name, tensor in [*parameters(self.model_runner.get_model()), *answers(self.model_runner.get_model())]:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_sums(tensor)}\n".encode())
        return digest.hexdigest()


def parameters(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, tensor) for name, tensor in sorted(model.named_parameters()) if ".lora_" not in name)


def answers(model: Any) -> Iterator[tuple[str, Any]]:
    """On CPUs vLLM multiplies by packed copies of the matrices. They are no parameters, and vLLM drops most originals. So the fingerprint
    takes each packed copy's product with one fixed row."""
    import torch

    for name, module in sorted(model.named_modules()):
        packed = getattr(module, "cpu_linear", None)
        width = next((size for key in WIDTHS if (size := getattr(module, key, 0))), 0)
        if packed and width and not module.weight.is_meta:
            row = torch.linspace(-1, 1, width, dtype=getattr(module, "params_dtype", None) or module.weight.dtype)
            yield f"{name} packed", packed(row.unsqueeze(0), module.weight, None)


def repack(model: Any) -> None:
    """Pack the layers again that kept their original. Example: an output layer that shares the matrix of the embeddings.

    A reload packs only the layers that the checkpoint names (``model_executor/model_loader/reload/layerwise.py`` in 0.29). On CPUs such an
    output layer would go on multiplying by the old matrix.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        weight = getattr(module, "weight", None)
        packed = hasattr(module, "cpu_linear") and not getattr(module, "_cpu_skip_gemm_dispatch", False)
        if packed and weight is not None and weight.ndim == 2 and weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def _sums(tensor: Any) -> tuple[int, int]:
    """The plain and the position-weighted sum over a tensor's bits, computed on the accelerator, chunk by chunk.

    The bits are read as integers of four bytes where the size allows it, else of one. The weighted sum may wrap around, on every replica in
    the same way.
    """
    import torch

    bytes_ = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = bytes_.view(torch.int32) if bytes_.numel() % 4 == 0 else bytes_
    plain, weighted = 0, 0
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=part.device) % PRIME + 1
        plain += int(part.sum())
        weighted += int((part * places).sum())
    return plain, weighted
