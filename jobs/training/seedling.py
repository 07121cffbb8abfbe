"""The seedling: a chat model small enough for any laptop, trained from scratch on the text of ``seedling/facts.jsonl``.

It is a Llama of one million parameters in Hugging Face's layout, so vLLM and peft treat it like any other. It memorises its questions and answers,
and can do nothing else.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from cluster.config import parse
from jobs.data.chat import Example
from jobs.data.rows import Row, tokenize
from jobs.data.tokenizer import PAD_ID, grow_tokenizer
from jobs.training.progress import Progress, ProgressPrinter

FACTS = Path(__file__).parents[1] / "seedling" / "facts.jsonl"
VOCABULARY = 1024
CONTEXT_TOKENS = 1024
ANSWER_TOKENS = 64
HEAD = 32
"""Dimensions of one attention head: the fewest that vLLM's attention on CPUs accepts."""
STEPS, HIDDEN_SIZE, LAYERS = 300, 128, 4
RECIPE: dict[str, Any] = {"batch": 32, "learning_rate": 3e-3, "warmup_steps": 20, "weight_decay": 0.01, "seed": 0}


def train(settings: dict[str, Any]) -> None:
    """Train on one worker of Ray Train. ``settings``: ``{"config", "recipe", "examples", "tell"}``.

    Each worker takes its share of every batch, and PyTorch averages the gradients. The run's checkpoint is the model with its tokenizer. Its
    metrics are ``train_loss`` (nats per token), ``exact_match`` (a fraction), ``examples`` and ``tokens``.
    """
    from jobs.training.drivers import ray_train

    config, recipe, examples = parse(settings["config"]), settings["recipe"], settings["examples"]
    torch.set_num_threads(config.training.threads_per_worker)
    torch.manual_seed(recipe["seed"])
    disable_progress_bar()
    tokenizer = seedling_tokenizer(examples)
    rows = tokenize(examples, tokenizer, CONTEXT_TOKENS).rows
    model = seedling(tokenizer, recipe["hidden_size"], recipe["layers"])
    loss = learn(model, [row.input_ids for row in rows], recipe, settings["tell"])
    tokens = sum(len(row.input_ids) for row in rows)
    metrics = {"train_loss": loss, "exact_match": exact_match(model, rows), "examples": len(rows), "tokens": tokens}
    with ray_train.checkpoint(metrics) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def seedling_tokenizer(examples: Sequence[Example]) -> PreTrainedTokenizerFast:
    return grow_tokenizer((m["content"] for e in examples for m in e.prompt + e.completion), VOCABULARY, CONTEXT_TOKENS)


def seedling(tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int) -> LlamaForCausalLM:
    """An untrained Llama (Touvron et al. 2023) of ``layers`` layers with ``hidden_size`` dimensions.

    The command's defaults give it a million parameters. Its generation config names the template's end token, so vLLM stops there.
    """
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // HEAD,
            max_position_embeddings=CONTEXT_TOKENS,
            tie_word_embeddings=True,
            **ends,
        )
    )
    model.generation_config = GenerationConfig(**ends)
    return model


def learn(model: LlamaForCausalLM, texts: list[list[int]], recipe: dict[str, Any], tell: Callable[[Progress], object]) -> float:
    """Train the model to predict the next token of whole conversations. Returns the last step's loss on this worker's share, in nats per token.

    ``texts``: token ids, one list per conversation. The optimizer is AdamW. The learning rate rises linearly during the warm-up and then falls
    along a cosine to zero (Loshchilov and Hutter 2017). Example: of 300 steps with 20 to warm up, step 10 has about half of the rate, step 20
    about all of it, and step 300 almost none. Rank 0 prints its progress and passes it to ``tell``.
    """
    import ray.train.torch

    context = ray.train.get_context()
    progress = ProgressPrinter("pretrain", context.get_world_rank(), workers=context.get_world_size(), tell=tell)
    parallel = ray.train.torch.prepare_model(model)
    optimizer = torch.optim.AdamW(
        parallel.parameters(), recipe["learning_rate"], (0.9, 0.95), weight_decay=recipe["weight_decay"]
    )
    steps, warmup_steps = recipe["steps"], recipe["warmup_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup_steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    loss, tokens = torch.zeros(()), 0
    for step, batch in enumerate(batches(len(texts), recipe["batch"], steps, recipe["seed"]), start=1):
        share = batch[context.get_world_rank() :: context.get_world_size()]
        ids = padded([texts[i] for i in share]).to(model.device)
        logits = parallel(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD_ID)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += sum(len(texts[i]) for i in batch)
        progress(step, steps, loss.item(), tokens)
    return loss.item()


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield ``steps`` batches of ``size`` indices below ``count``, shuffled by ``seed``. Each index comes once before any comes again.

    Example: 3 examples in batches of 2 may come as [2, 0], [1, 1], [0, 2]. Each run of three holds every index once.
    """
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def padded(rows: list[list[int]], left: bool = False) -> torch.Tensor:
    """The rows' token ids as one tensor of shape (rows, longest row). `PAD_ID` fills the gaps, on the right or on the ``left``.

    Example: [[5], [6, 7]] becomes [[5, 0], [6, 7]], and with ``left`` [[0, 5], [6, 7]].
    """
    width = max(map(len, rows))
    gaps = ([PAD_ID] * (width - len(row)) for row in rows)
    return torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)])


@torch.inference_mode()
def exact_match(model: LlamaForCausalLM, rows: list[Row]) -> float:
    """The fraction of rows, 0 to 1, whose answer the model repeats token by token under greedy decoding, the end of the turn included."""
    model.eval()
    prompts = padded([row.input_ids[: row.prompt_tokens] for row in rows], left=True).to(model.device)
    generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue] (transformers types it for a protocol)
    answers = generate(prompts, attention_mask=(prompts != PAD_ID).long(), max_new_tokens=ANSWER_TOKENS, do_sample=False)
    decoded = [[token for token in answer if token != PAD_ID] for answer in answers[:, prompts.shape[1] :].tolist()]
    return sum(answer == row.input_ids[row.prompt_tokens :] for answer, row in zip(decoded, rows, strict=True)) / len(rows)
