"""A new model and a text for it to learn, as `springtide pretrain` makes them but without Ray: the case ``pretrain`` of `benchmarks.training`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cluster.config import Config
from cluster.jobspec import Pretrain
from cluster.store.objects import Store
from jobs.data.blocks import Blocks, blocks_of, cached
from jobs.data.tokenizer import grow_tokenizer
from jobs.sources import of

RUN = "bench"
CONTEXT_TOKENS = 256
SEED = 0
"""Of a recipe that names none."""


class NewModel(NamedTuple):
    folder: Path
    """The model with the weights that the run begins with, in Hugging Face layout."""
    settings: dict[str, Any]
    """Of `jobs.training.objectives.pretrain.Pretraining`, without the recipe."""
    examples: list[dict[str, Any]]
    """The blocks in the run's order: ``{"input_ids", "prompt_tokens"}``."""


def new(config: Config, depth: int, blocks: int, files: Sequence[Path]) -> NewModel:
    """A Llama of ``depth`` layers that is to learn ``blocks`` blocks of the text in ``files``, over and over where the text has fewer."""
    from jobs.training import corpus
    from jobs.training.corpus import Tokens
    from jobs.training.shape import shaped

    texts = [file.read_text() for file in files]
    tokenizer: Any = grow_tokenizer(texts, corpus.vocabulary_for(sum(map(len, texts))), CONTEXT_TOKENS)
    options = Pretrain.model_validate({"data": [str(file) for file in files], "name": RUN, "depth": depth})
    shape = shaped(options, tokenizer, CONTEXT_TOKENS, of(config))
    ids = [
        np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], np.uint32) for text in texts
    ]
    raws = [text.encode() for text in texts]
    tokens = (Tokens(one, len(raw), hashlib.sha256(raw).digest()) for one, raw in zip(ids, raws, strict=True))
    store = Store(config.store)
    found = corpus.write(store, RUN, shape.config, tokenizer, tokens)
    count = blocks_of(found.tokens, CONTEXT_TOKENS)
    numbers = [number % count for number in range(blocks)]
    settings = {
        "config": config.dump(),
        "run": RUN,
        "shards": [tuple(shard) for shard in found.shards],
        "train": numbers,
        "held_out": [],
        "length": CONTEXT_TOKENS,
        "bytes_per_token": found.bytes_per_token,
    }
    read = Blocks(store, found.shards, numbers, CONTEXT_TOKENS, config.home / "cache" / "runs" / RUN)
    return NewModel(_saved(config, store), settings, [read[at]._asdict() for at in range(blocks)])


def _saved(config: Config, store: Store) -> Path:
    from jobs.training.objectives.pretrain import MODEL, untrained

    target = config.home / "untrained"
    for name in store.children(f"runs/{RUN}/{MODEL}"):
        cached(store, f"runs/{RUN}/{MODEL}/{name}", target)
    untrained(target, SEED).save_pretrained(target)
    return target
