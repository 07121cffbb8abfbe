"""One loss everywhere: what a job reports and what the gate compares are the same number of the same examples."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.publishing.gate import token_mean
from jobs.data import Row
from jobs.training.held_out import answer_tokens, held_out_loss, measured
from jobs.training.process_group import ProcessGroup, joined

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


@torch.no_grad()
def test_a_job_reports_what_the_gate_compares(model: LlamaForCausalLM, tmp_path: Path) -> None:
    """The job used to report a mean over tokens, and the gate a mean over the means of examples."""
    with joined(ProcessGroup(1, 0, 1, (tmp_path / "file").as_uri()), cuda=False):
        reported = held_out_loss(model, ROWS, 2, rank=0, world=1)
    assert reported == pytest.approx(token_mean(list(measured(model, ROWS, 8))), rel=1e-6)


@torch.no_grad()
def test_the_loss_of_an_example_depends_on_neither_its_batch_nor_the_padding(model: LlamaForCausalLM) -> None:
    alone, joined_up = list(measured(model, ROWS, 1)), list(measured(model, ROWS, 5))
    assert [one.tokens for one in alone] == [one.tokens for one in joined_up] == [answer_tokens(row) for row in ROWS]
    assert [one.nats for one in joined_up] == pytest.approx([one.nats for one in alone], rel=1e-5)


@torch.no_grad()
def test_the_loss_is_transformers_own(model: LlamaForCausalLM) -> None:
    for row, one in zip(ROWS, measured(model, ROWS, 3), strict=True):
        labels = [-100] * row.prompt_tokens + row.input_ids[row.prompt_tokens :]
        theirs = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
        assert one.nats / one.tokens == pytest.approx(theirs.item(), rel=1e-5)
