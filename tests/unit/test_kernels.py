"""Other code for a model's layers: what it computes stays the same, and what is not there is refused in words."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import Config
from cluster.errors import ConfigError
from jobs.data.rows import Row
from jobs.training import recipe
from jobs.training.recipe import Recipe
from jobs.training.step import kernels
from tests.unit.test_objectives import ROWS, registered, work

NEW = [
    Row(list(range(2, 2 + length)), prompt) for length, prompt in ((3, 1), (23, 5), (11, 2), (37, 30), (50, 4), (6, 3), (45, 1))
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return registered(tmp_path_factory.mktemp("kernels"))


LIGER = Recipe.model_validate({"kernels": "liger"})
ADAPTER, HALF = {"lora": {"rank": 4, "alpha": 8}}, {"precision": "bfloat16"}


@pytest.mark.parametrize("how", [ADAPTER, HALF, {"gradient_checkpointing": True}], ids=["adapter", "bfloat16", "recomputed"])
def test_compiled_layers_learn_the_same_and_new_lengths_need_no_new_code(config: Config, how: Any, monkeypatch: Any) -> None:
    """The layers are traced as they are for the compiler, which takes minutes more to make machine code of them."""
    monkeypatch.setattr(kernels, "COMPILER", "eager")
    learn_the_same(config, how)


@pytest.mark.chaos
@pytest.mark.parametrize("how", [ADAPTER, HALF], ids=["adapter", "bfloat16"])
def test_machine_code_learns_the_same(config: Config, how: Any) -> None:
    learn_the_same(config, how)


def learn_the_same(config: Config, how: dict[str, Any]) -> None:
    plain, compiled = (work(config, [*ROWS, *NEW], micro_batch_tokens=60, compile=on, **how) for on in (False, True))
    rounding = 2e-2 if how == HALF else 1e-4
    for batch in ([0, 1, 2, 3, 4, 5], [1, 3], list(range(6, 13)), [6], [7, 8, 9]):
        # The first batches leave nothing to find out.
        with torch.compiler.set_stance("fail_on_recompile" if batch[0] > 5 else "default"):
            losses = [made.gradients(batch, 0, 1)[0].item() for made in (plain, compiled)]
        assert losses[1] == pytest.approx(losses[0], rel=rounding)
        wanted, found = plain.flat.gradient, compiled.flat.gradient
        assert torch.allclose(found, wanted, rtol=rounding, atol=rounding * wanted.abs().max().item()) and wanted.any()


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not valid: compile: true and sharding exclude each other"):
        recipe.load("full", ["compile=true", "sharding=fsdp"])


@pytest.mark.parametrize(("gpu", "words"), [(False, "this pool has none"), (True, "needs the package liger-kernel")])
def test_kernels_that_are_not_there_are_refused(gpu: bool, words: str) -> None:
    kernels.check(Recipe.model_validate({}), gpu, "llama")
    with pytest.raises(ConfigError, match=words):
        kernels.check(LIGER, gpu, "llama")


@pytest.fixture
def liger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package is for GPUs and not here. A module that looks like it stands in."""
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel/__init__.py").touch()
    (tmp_path / "liger_kernel/transformers.py").write_text(
        "def apply_liger_kernel_to_llama(fused_linear_cross_entropy, model):\n    model.marked = fused_linear_cross_entropy\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("liger_kernel", "liger_kernel.transformers"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_ligers_function_is_the_one_for_the_type_of_the_model(config: Config, liger: None, lora: Any) -> None:
    kernels.check(LIGER, True, "llama")
    with pytest.raises(ConfigError, match="knows no model of the type cat"):
        kernels.check(LIGER, True, "cat")
    assert work(config, kernels="liger", lora=lora).model.marked is False
