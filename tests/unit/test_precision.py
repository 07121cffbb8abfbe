"""`precision: auto`: what a run computes in is tried out on the processor that it has."""

import pytest
import torch

from jobs.training.recipe import Recipe
from jobs.training.step import precision


@pytest.mark.parametrize(("exact_s", "fast_s", "chosen"), [(1.7, 1.0, "float32"), (2.6, 1.0, "bfloat16")])
def test_bfloat16_is_chosen_where_a_block_is_twice_as_fast(
    monkeypatch: pytest.MonkeyPatch, exact_s: float, fast_s: float, chosen: str
) -> None:
    def timed(width: int, bfloat16: bool) -> float:
        return fast_s if bfloat16 else exact_s

    monkeypatch.setattr(precision, "block_s", timed)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert precision.resolve(Recipe.model_validate({}), False, 128).precision == chosen


def test_a_processor_that_does_not_know_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict[str, bool])
    assert precision.resolve(Recipe.model_validate({}), False, 4096).precision == "float32"


def test_a_recipe_that_names_its_precision_keeps_it() -> None:
    named = Recipe.model_validate({"precision": "bfloat16"})
    assert precision.resolve(named, False, 128) is named


def test_a_block_of_a_wide_model_is_timed_in_seconds_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    precision.faster_in_bfloat16(8192)
    assert torch.get_num_threads() == before
    assert precision.block_s(64, bfloat16=True) > 0
