"""The text of a pretraining run in the store: its tokens, beside the new model's shape and tokenizer.

Ray Data reads the sources and tokenises their pieces on the whole pool, in order; the driver writes the tokens as they come, one shard after the
other (`jobs.data.blocks`). So neither the text nor its tokens have to fit in any memory, except for the largest single file.

``runs/<run>/model`` has the shape and the tokenizer, ``runs/<run>/text`` the shards, and ``corpus.json``, which is written last, says that all of it
is there. A resumed run finds it and reads no text again.
"""

import functools
import hashlib
import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray.data
from transformers import PretrainedConfig

from cluster import niceness
from cluster.errors import BadRequest, DataError
from cluster.store.objects import Store
from jobs import sources
from jobs.data import blocks
from jobs.data.blocks import Shard
from jobs.data.text import PIECE, pieces
from jobs.data.tokenizer import grow_tokenizer
from jobs.training.objectives.pretrain import MODEL

TEXT, ABOUT = "text", "corpus.json"
SAMPLE_CHARACTERS = 1 << 26
"""A new tokenizer learns from so much of the text at most."""
VOCABULARIES = 9, 15
"""The smallest and the largest vocabulary that is chosen by itself, as powers of two."""
TELL_S = 3
BLOCK_BYTES = 4 << 20
"""Ray Data passes pieces on in blocks of about this size, so that a large file is tokenised by several processes."""


class Corpus(NamedTuple):
    """A text as tokens."""

    shards: list[Shard]
    tokens: int
    text_bytes: int
    """In UTF-8."""
    sha256: str
    """Over the digests of the text's pieces: the same text has the same digest, in however many files it came."""

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens


class Tokens(NamedTuple):
    """One piece as token ids."""

    ids: np.ndarray[Any, Any]
    text_bytes: int
    sha256: bytes


def stored(store: Store, run: str) -> Corpus | None:
    """The corpus that the run has already; None if it has none, or not all of it."""
    raw = store.get(f"runs/{run}/{ABOUT}")
    if raw is None:
        return None
    known = json.loads(raw)
    return Corpus(**{**known, "shards": [Shard(*one) for one in known["shards"]]})


def write(store: Store, run: str, shape: PretrainedConfig, tokenizer: Any, found: Iterable[Tokens]) -> Corpus:
    """Write the new model's shape and tokenizer and the tokens of its text to the run's folder. Raises `DataError` where there is no text."""
    with tempfile.TemporaryDirectory() as scratch:
        shape.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            store.upload(f"runs/{run}/{MODEL}/{file.name}", file)
    seen: list[tuple[int, int]] = []
    digest = hashlib.sha256()

    def noted() -> Iterator[np.ndarray[Any, Any]]:
        for part in found:
            seen.append((len(part.ids), part.text_bytes))
            digest.update(part.sha256)
            yield part.ids

    shards = blocks.write(store, f"runs/{run}/{TEXT}", noted())
    made = Corpus(shards, sum(tokens for tokens, _ in seen), sum(size for _, size in seen), digest.hexdigest())
    if not made.tokens:
        raise DataError("There is no text in what --data names.", "Name files that have some.")
    store.put_new(f"runs/{run}/{ABOUT}", json.dumps(made._asdict()).encode())
    return made


# a new tokenizer


def learnt_tokenizer(named: Sequence[str], fetch: sources.Fetch, vocabulary: int | None, context_tokens: int) -> Any:
    """A tokenizer learnt from the text of the sources, or from a sample of it. ``vocabulary``: its size, or None for `vocabulary_for`."""
    texts = list(sampled(named, fetch, SAMPLE_CHARACTERS))
    return grow_tokenizer(texts, vocabulary or vocabulary_for(sum(map(len, texts))), context_tokens)


def vocabulary_for(characters: int) -> int:
    """The power of two that is nearest to the square root of the text's characters, between 512 and 32,768.

    A text uses new words about as often as the square root of its length grows (Heaps 1978), and a token that is rare is learnt badly.

    >>> [vocabulary_for(characters) for characters in (1000, 1_115_394, 67_108_864, 10**12)]
    [512, 1024, 8192, 32768]
    """
    least, most = VOCABULARIES
    return 1 << min(most, max(least, round(math.log2(math.sqrt(max(1, characters))))))


def sampled(named: Sequence[str], fetch: sources.Fetch, limit_characters: int) -> Iterator[str]:
    """Text of all sources, if it has at most ``limit_characters``; otherwise of some, each of which gives its beginning. The same every time."""
    order = random.Random(0).sample(list(named), len(named))  # noqa: S311 (a sample, no secret)
    each = max(PIECE, limit_characters // max(1, len(named)))
    left = limit_characters
    for source in order:
        mine = min(each if len(named) > 1 else left, left)
        for piece in pieces(source, fetch):
            yield piece.text[:mine]
            mine, left = mine - len(piece.text), left - len(piece.text)
            if mine <= 0:
                break
        if left <= 0:
            return


# by Ray Data


def tokenised(named: Sequence[str], fetch: sources.Fetch, tokenizer: Any, tell: Callable[[str], object]) -> Iterator[Tokens]:
    """The sources' pieces as tokens, in order. Raises `DataError` naming the file and the place. ``tell`` hears how far it is."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    files = ray.data.from_items([{"source": source} for source in named], override_num_blocks=len(named))
    # The two stages ask for different shares of a processor, because Ray Data would otherwise run both in one task, file by file.
    read = files.flat_map(functools.partial(_read, fetch), num_cpus=0.5)
    rows = read.map(functools.partial(_encode, tokenizer), num_cpus=1).iter_rows()
    said_s, documents, characters, tokens = time.monotonic(), 0, 0, 0
    for row in rows:
        if row["problem"]:
            raise DataError(row["problem"], row["do"])
        found = Tokens(np.frombuffer(row["ids"], np.uint32), row["text_bytes"], row["sha256"])
        documents, characters, tokens = documents + row["last"], characters + row["characters"], tokens + len(found.ids)
        if time.monotonic() - said_s >= TELL_S:
            tell(f"tokenising: {documents:,} documents, {characters:,} characters, {tokens:,} tokens")
            said_s = time.monotonic()
        yield found


def _read(fetch: sources.Fetch, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A source's pieces, or what is wrong with it: an exception would reach the driver without its class."""
    niceness.renice(niceness.TRAINING)
    try:
        for piece in pieces(row["source"], fetch):
            yield {"text": piece.text, "last": int(piece.last), "problem": "", "do": ""}
    except BadRequest as error:
        yield {"text": "", "last": 1, "problem": error.message, "do": error.do}


def _encode(tokenizer: Any, row: dict[str, Any]) -> dict[str, Any]:
    """A piece as token ids of four bytes each. The end of a document has a token of its own."""
    niceness.renice(niceness.TRAINING)
    text = row.pop("text")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * row["last"]
    raw = text.encode()
    return {
        **row,
        "ids": np.array(ids, np.uint32).tobytes(),
        "characters": len(text),
        "text_bytes": len(raw),
        "sha256": hashlib.sha256(raw).digest(),
    }
