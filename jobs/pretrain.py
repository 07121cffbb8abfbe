"""Trains the seedling from scratch: a chat model small enough for any laptop, on the text of ``seedling/facts.jsonl``.

``python -m jobs.pretrain --name seedling`` takes about a minute on two cores. It registers the next version. If the alias does not exist yet,
it makes that version live. The model is a Llama of one million parameters in Hugging Face's layout, so vLLM and peft treat it like any other.
It memorises its questions and answers, and can do nothing else. ``--hidden-size`` and ``--layers`` choose another shape.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from cluster.config import Config, load, parse
from cluster.jobspec import Pretrain, command_line
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Generation, Lineage, Manifest, check_name
from jobs import main, reach
from jobs.data import chat
from jobs.data.rows import Row, tokenize
from jobs.record import JobRecord, record
from jobs.training.progress import Progress, ProgressPrinter
from jobs.training.relay import relayed

FACTS = Path(__file__).parent / "seedling" / "facts.jsonl"
PAD, END = "<|pad|>", "<|end|>"
PAD_ID = 0  # the trainer numbers special tokens from 0, in order
ROLES = ("system", "user", "assistant")
ROLE_TOKENS = [f"<|{role}|>" for role in ROLES]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ 'system' if message['role'] == 'developer' else message['role'] }}|>"
    "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 1024
CONTEXT_TOKENS = 1024
ANSWER_TOKENS = 64
HEAD = 32
"""Dimensions of one attention head: the fewest that vLLM's attention on CPUs accepts."""
RECIPE: dict[str, Any] = {"batch": 32, "learning_rate": 3e-3, "warmup_steps": 20, "weight_decay": 0.01, "seed": 0}


def run() -> None:
    options: Pretrain = command_line("pretrain")
    config = load()
    with record(config, options) as job:
        pretrain(config, options, job)


def pretrain(config: Config, options: Pretrain, job: JobRecord) -> None:
    check_name(options.name)
    registry = Registry(Store(config.store))
    registry.store.check_writable()
    facts = chat.read(str(FACTS))
    job.know(dataset_sha256=facts.sha256)
    recipe = {**RECIPE, "steps": options.steps, "hidden_size": options.hidden_size, "layers": options.layers}
    reach(config)
    from jobs.training import ray_train  # and with it Ray, which must come after `reach`

    ray_train.connect()
    settings = {"config": config.dump(), "recipe": recipe, "examples": facts.examples}
    with relayed(job.watch) as tell:
        result = ray_train.fit(config, train, {**settings, "tell": tell}, job.id)
    lineage = Lineage(
        dataset_sha256=facts.sha256,
        recipe=recipe,
        job=job.id,
        code_revision=ray_train.code_revision(),
        metrics=result.metrics or {},
    )
    with ray_train.files(result) as folder:
        manifest = registry.register(options.name, "weights", None, folder, lineage)
    move = go_live(registry, manifest, options.live)
    job.made(**ray_train.result(manifest, "live" if move else None))


def go_live(registry: Registry, manifest: Manifest, live: bool | None) -> Generation | None:
    """Move the model's own alias to the new version, in the store. Returns the move; None if the alias stays where it is.

    ``live``: True moves the alias, False leaves it, None moves it only if it does not exist yet. Control takes no part, because before the
    first version no replica serves anything. Raises `Conflict` if somebody else moves the alias at the same time.
    """
    now = registry.alias(manifest.id.name)
    if live is False or (live is None and now is not None):
        return None
    after = now.generation if now else 0
    return registry.move(manifest.id.name, manifest.id, "pretrained", manifest.lineage.job or "pretrain", after)


# on the workers


def train(settings: dict[str, Any]) -> None:
    """Train on one worker of Ray Train. ``settings``: ``{"config", "recipe", "examples", "tell"}``.

    Each worker takes its share of every batch, and PyTorch averages the gradients. The run's checkpoint is the model with its tokenizer. Its
    metrics are ``train_loss`` (nats per token), ``exact_match`` (a fraction), ``examples`` and ``tokens``.
    """
    from jobs.training import ray_train

    config, recipe, examples = parse(settings["config"]), settings["recipe"], settings["examples"]
    torch.set_num_threads(config.training.threads_per_worker)
    torch.manual_seed(recipe["seed"])
    disable_progress_bar()
    tokenizer = grow_tokenizer([m["content"] for e in examples for m in e.prompt + e.completion])
    rows = tokenize(examples, tokenizer, CONTEXT_TOKENS).rows
    model = seedling(tokenizer, recipe["hidden_size"], recipe["layers"])
    loss = learn(model, [row.input_ids for row in rows], recipe, settings["tell"])
    tokens = sum(len(row.input_ids) for row in rows)
    metrics = {"train_loss": loss, "exact_match": exact_match(model, rows), "examples": len(rows), "tokens": tokens}
    with ray_train.checkpoint(metrics) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def grow_tokenizer(
    texts: Iterable[str], vocabulary: int = VOCABULARY, context_tokens: int = CONTEXT_TOKENS
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens, learnt from ``texts``.

    Byte pair encoding merges the most frequent pairs of tokens (Sennrich et al. 2016). It starts from single bytes as in GPT-2 (Radford et al.
    2019), so the tokenizer encodes any UTF-8 text. Each digit is a token of its own. Example: "in 1969" ends with four tokens for the year.
    """
    tokenizer = Tokenizer(models.BPE())
    by_digit, by_byte = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_digit, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=ROLE_TOKENS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )


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


if __name__ == "__main__":
    main(run)
