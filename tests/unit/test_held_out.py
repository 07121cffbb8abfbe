"""One loss everywhere: what a job reports and what the gate compares are the same number of the same examples."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from cluster.publishing.gate import token_mean
from jobs.data.rows import Row
from jobs.training.objectives.held_out import answer_losses, answer_tokens, held_out_loss, measured
from jobs.training.process_group import ProcessGroup, joined
from jobs.training.step import packed as packing
from jobs.training.step import vocabulary
from jobs.training.step.packed import is_packed, pack

ROWS = [Row(list(range(2, 2 + length)), prompt) for length, prompt in ((4, 3), (30, 5), (9, 0), (17, 16), (12, 4))]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64,
        max_position_embeddings=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(shape).eval()


@pytest.fixture(scope="module")
def packed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same model, which takes its examples without padding."""
    prepared = copy.deepcopy(model)
    assert pack(prepared)
    return prepared


@torch.no_grad()
def test_a_job_reports_what_the_gate_compares(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The job used to report a mean over tokens, and the gate a mean over the means of examples."""
    with joined(ProcessGroup(1, 0, 1, (tmp_path / "file").as_uri()), cuda=False):
        reported = held_out_loss(model, ROWS, 20, rank=0, world=1)
    assert reported == pytest.approx(token_mean(measured(model, ROWS, 100)), rel=1e-6)


@torch.no_grad()
def test_the_loss_of_an_example_depends_on_neither_its_batch_nor_the_padding(model: LlamaForCausalLM) -> None:
    alone, joined_up = measured(model, ROWS, 1), measured(model, ROWS, 100)
    assert [one.tokens for one in alone] == [one.tokens for one in joined_up] == [answer_tokens(row) for row in ROWS]
    assert [one.nats for one in joined_up] == pytest.approx([one.nats for one in alone], rel=1e-5)


@torch.no_grad()
def test_packed_examples_have_the_losses_that_they_have_alone(model: LlamaForCausalLM, packed: LlamaForCausalLM) -> None:
    alone, joined_up = measured(model, ROWS, 1), measured(packed, ROWS, 100)
    assert [one.nats for one in joined_up] == pytest.approx([one.nats for one in alone], rel=1e-5)


def test_packed_examples_have_the_gradients_that_they_have_alone(model: LlamaForCausalLM, packed: LlamaForCausalLM) -> None:
    def gradients(of: LlamaForCausalLM) -> torch.Tensor:
        of.zero_grad()
        answer_losses(of, ROWS).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in of.parameters() if parameter.grad is not None])

    assert torch.allclose(gradients(packed), gradients(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 50])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_logits_by_chunks_have_the_losses_and_gradients_of_whole_ones(
    packed: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, tokens: int, precision: torch.dtype
) -> None:
    def found() -> tuple[torch.Tensor, torch.Tensor]:
        packed.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            losses = answer_losses(packed, ROWS)
        (losses * torch.arange(1, 6)).sum().backward()
        return losses.detach(), torch.cat(
            [parameter.grad.flatten() for parameter in packed.parameters() if parameter.grad is not None]
        )

    assert packed.ends_in_head
    losses, gradient = found()
    monkeypatch.setattr(vocabulary, "CHUNK_NUMBERS", 64 * tokens)
    some, other = found()
    rounding = 1e-5 if precision == torch.float32 else 2e-2
    assert torch.equal(some, losses)
    assert torch.allclose(other, gradient, rtol=rounding, atol=rounding * gradient.abs().max().item()) and gradient.any()


def test_an_output_layer_that_something_follows_gives_its_logits_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits, which the layer does not know."""
    monkeypatch.setattr(vocabulary, "CHUNK_NUMBERS", 64 * 7)
    capped = Gemma2ForCausalLM(gemma(final_logit_softcapping=0.01)).eval()
    alone = measured(capped, ROWS, 1)
    pack(capped)
    assert not capped.ends_in_head
    assert [one.nats for one in measured(capped, ROWS, 100)] == pytest.approx([one.nats for one in alone], rel=1e-5)


def gemma(**more: Any) -> Gemma2Config:
    return Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        **more,
    )


def test_a_model_whose_attention_is_another_keeps_its_own() -> None:
    """Gemma 2 caps the scores of its attention, and a packed row would lose that."""
    capped = Gemma2ForCausalLM(gemma(attn_logit_softcapping=0.01)).eval()
    alone = measured(capped, ROWS, 1)
    assert not pack(capped) and not is_packed(capped)
    assert [one.nats for one in measured(capped, ROWS, 100)] == pytest.approx([one.nats for one in alone], rel=1e-5)


@pytest.mark.parametrize("window", [4, 16])
def test_a_sliding_window_ends_within_an_example(window: int) -> None:
    shape = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
    )
    model = MistralForCausalLM(shape).eval()
    alone = measured(model, ROWS, 1)
    assert pack(model)
    assert [one.nats for one in measured(model, ROWS, 100)] == pytest.approx([one.nats for one in alone], rel=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("bounds", [[0, 3, 12, 13], [0, 13]])
def test_the_kernel_for_gpus_is_asked_for_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, window: Any, bounds: list[int]
) -> None:
    """There is no GPU here. So a plain function stands in, which does what PyTorch's documentation says of `varlen_attn`."""
    monkeypatch.setattr(packing, "varlen_attn", documented)
    q, k, v = (torch.randn(1, heads, 13, 8) for heads in (4, 2, 2))
    wanted = packing.attend(
        torch.nn.Module(), q, k, v, None, scaling=0.3, segment_bounds=torch.tensor(bounds), sliding_window=window
    )[0]
    monkeypatch.setattr(packing, "_flash_agrees", lambda *kind: True)
    found = packing.attend(
        torch.nn.Module(), q, k, v, None, scaling=0.3, segment_bounds=torch.tensor(bounds), sliding_window=window
    )[0]
    assert found.shape == wanted.shape == (1, 13, 4, 8) and torch.allclose(found, wanted, atol=1e-6)


def documented(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """Shape (tokens, heads, width), as all that it takes. ``window_size``: how far a token looks back and ahead; -1 for all."""
    back, ahead = window_size
    assert ahead == 0 and enable_gqa and cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == cu_seq_q.diff().max()
    made = torch.zeros_like(query)
    for at in range(len(query)):
        first = max(start for start in cu_seq_q.tolist() if start <= at)
        first = first if back < 0 else max(first, at - back)
        for head in range(query.shape[1]):
            keys, values = (each[first : at + 1, head // 2] for each in (key, value))
            made[at, head] = (keys @ query[at, head] * scale).softmax(0) @ values
    return made


@torch.no_grad()
def test_the_loss_is_transformers_own(model: LlamaForCausalLM) -> None:
    for row, one in zip(ROWS, measured(model, ROWS, 30), strict=True):
        labels = [-100] * row.prompt_tokens + row.input_ids[row.prompt_tokens :]
        theirs = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
        assert one.nats / one.tokens == pytest.approx(theirs.item(), rel=1e-5)
