"""A checksum of the weights as they lie in the accelerator's memory, computed by the engine's own worker.

vLLM mixes this class into its worker (``worker_extension_cls``), so that the replica can ask for it by name.
"""

from typing import Any

CHUNK = 1 << 24
PRIME = 65_521


class Fingerprint:
    """Mixed into vLLM's worker; ``self.model_runner`` is the worker's."""

    model_runner: Any

    def fingerprint(self) -> str:
        """Depends on every parameter's name, shape and bits, and on their order; the same on every replica that loaded the same files."""
        import hashlib

        digest = hashlib.sha256()
        for name, parameter in sorted(self.model_runner.get_model().named_parameters()):
            if ".lora_" not in name:
                digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {_sums(parameter)}\n".encode())
        return digest.hexdigest()


def _sums(parameter: Any) -> tuple[int, int]:
    """Plain and position-weighted sums over the bits, read as integers of four bytes where they fit, on the accelerator, chunk by chunk.

    The weighted ones may wrap around, everywhere in the same way.
    """
    import torch

    bytes_ = parameter.detach().contiguous().view(-1).view(torch.uint8)
    words = bytes_.view(torch.int32) if bytes_.numel() % 4 == 0 else bytes_
    plain, weighted = 0, 0
    for start in range(0, words.numel(), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=part.device) % PRIME + 1
        plain += int(part.sum())
        weighted += int((part * places).sum())
    return plain, weighted
