"""What a training needs of memory, and whether workers share a model for want of it."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.capacity.fit import GIB
from cluster.config import parse
from jobs.training.recipe import Recipe
from jobs.training.sharding.fit import Needed, Sizes, choose, needed, resolve, sizes_of, token_bytes

FULL = Recipe.model_validate({"precision": "float32"})

SMALL = Sizes(1000, 1000, 200, 600, 2, 10, 40, 50)
ADAPTER = SMALL._replace(parameters=1100, trained=100)


@pytest.mark.parametrize(
    ("sizes", "precision", "workers", "found"),
    [
        (SMALL, "float32", 1, (4000, 4000, 8000)),
        (SMALL, "bfloat16", 1, (4000 + 2000, 4000, 8000)),
        (SMALL, "float32", 4, (1000 + 4 * 1000, 1000, 2000)),
        (SMALL, "bfloat16", 4, (1000 + 2 * 1000, 1000, 2000)),
        (ADAPTER, "float32", 1, (4000 + 400, 400, 800)),
        (ADAPTER, "bfloat16", 1, (2000 + 400, 400, 800)),
        (ADAPTER, "bfloat16", 4, (500 + 400 + 2 * 1000, 400, 800)),
    ],
    ids=lambda value: "adapter" if value is ADAPTER else "all" if value is SMALL else None,
)
def test_what_is_in_memory_whole_or_in_slices(sizes: Sizes, precision: str, workers: int, found: tuple[int, ...]) -> None:
    assert needed(sizes, 0, precision, workers)[:3] == found


WHOLE, SLICES = Needed(4 * GIB, 0, 0, 0), Needed(GIB, 0, 0, 0)


@pytest.mark.parametrize(
    ("slot_bytes", "workers", "weights", "why"),
    [
        (6 * GIB, 4, "whole", "a slot has 6.0 GiB, and the whole model takes 6.0 GiB"),
        (5 * GIB, 4, "fsdp", "a slot has 5.0 GiB, and the whole model takes 6.0 GiB; of 4 workers each takes 3.0 GiB"),
        (5 * GIB, 1, "whole", "a slot has 5.0 GiB, and the whole model takes 6.0 GiB; one worker has nobody to share it with"),
        (None, 4, "whole", "it is not known how much memory a slot has"),
    ],
)
def test_workers_share_what_does_not_fit_whole(slot_bytes: int | None, workers: int, weights: str, why: str) -> None:
    choice = choose(WHOLE, SLICES, slot_bytes, workers)
    assert choice.weights == weights and choice.why.startswith(why)


def kept_bytes(model: Any, tokens: int) -> int:
    """What autograd keeps of a forward pass beside the parameters, and the gradient of its logits."""
    kept: dict[int, int] = {}
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in own:
            kept[at] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(tokens)[None] % model.config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits[0].float(), ids[0])
    assert loss > 0
    return sum(kept.values()) + 4 * tokens * model.config.vocab_size


@pytest.mark.parametrize(("kv_heads", "intermediate"), [(4, 384), (1, 256), (4, 1024)])
def test_a_token_takes_what_autograd_keeps_of_it(kv_heads: int, intermediate: int) -> None:
    shape = LlamaConfig(
        vocab_size=500,
        hidden_size=128,
        intermediate_size=intermediate,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    sizes, tokens = sizes_of(shape, FULL), 256
    found = kept_bytes(LlamaForCausalLM(shape), tokens) / tokens
    print(f"counted {token_bytes(sizes, 4, False, False)}, kept {found:.0f}")
    assert token_bytes(sizes, 4, False, False) == pytest.approx(found, rel=0.2)


def test_on_a_small_pool_a_small_model_stays_whole(capsys: pytest.CaptureFixture[str]) -> None:
    shape = LlamaConfig(vocab_size=500, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)
    recipe = Recipe.model_validate({"sharding": "auto", "precision": "float32"})
    config = parse({"pool": {"slots": 1}, "training": {"workers": 2}})
    assert resolve(recipe, config, shape).sharding.weights == "whole"
    assert capsys.readouterr().out.startswith("sharding: whole, because a slot has ")
    assert resolve(FULL, config, shape) == FULL
