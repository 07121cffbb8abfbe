"""How much of a processor's peak a run uses: model FLOPs utilisation (MFU; Chowdhery et al. 2022, PaLM).

It counts what the model needs for each token and nothing that is computed twice or on padding. Example: training an adapter on a frozen model of
1e9 weights takes 4e9 operations per token. At 1,000 tokens per second on a processor with a peak of 2e13 per second, that is an MFU of 0.2.
"""

import time
from typing import Any

import torch

PEAK_TFLOPS = {
    "A10": 125,
    "A100": 312,
    "L4": 121,
    "L40S": 362,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
}
"""Dense products in bfloat16, from NVIDIA's data sheets."""
TRIED_TOKENS, TRIED_TIMES = 256, 5


def per_token(model: Any) -> float:
    """Floating point operations for one token: two for each weight in a product forward, two for the gradient of what goes in, and two for each
    trained weight's own gradient. The attention's scores are left out; they matter in long texts only."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up = set() if head is not None and head.weight is embedding.weight else {id(embedding.weight)}
    products = [one for one in model.parameters() if one.ndim >= 2 and id(one) not in looked_up]
    return 4.0 * sum(one.numel() for one in products) + 2.0 * sum(one.numel() for one in products if one.requires_grad)


def peak_per_s(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Operations per second at most; 0 where nobody knows. A GPU's comes from its data sheet, and a processor's from a product timed here."""
    if device.type != "cuda":
        return product_per_s(width, dtype)
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((tera * 1e12 for name, tera in PEAK_TFLOPS.items() if name in words), 0.0)


def product_per_s(width: int, dtype: torch.dtype) -> float:
    """Operations per second in a product as a feed-forward layer of this width has, on the threads that PyTorch uses now."""
    tokens, weights = torch.ones(TRIED_TOKENS, width, dtype=dtype), torch.ones(3 * width, width, dtype=dtype)
    took_s: list[float] = []
    for _ in range(TRIED_TIMES):
        began_s = time.perf_counter()
        torch.nn.functional.linear(tokens, weights)
        took_s.append(time.perf_counter() - began_s)
    return 2.0 * TRIED_TOKENS * weights.numel() / min(took_s)
