"""A model without weights: to count its parameters, and to see how its layers are named."""

from typing import Any

import torch


def weightless(config: Any) -> Any:
    """The model that transformers makes of ``config``, on the meta device, which takes no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
