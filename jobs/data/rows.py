"""Rows: examples as token ids, by the base's own chat template, and what is held out of them.

The template is what serving uses, so a model learns what it will be asked. An example that a template cannot say whole is refused by its line:
a template that leaves out tools would otherwise teach the model to call tools that it never saw.
"""

import json
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from cluster.errors import DataError
from jobs.data.chat import Example

NAMED_LINES = 5
"""How many lines a message names."""


class OnALine(Protocol):
    """An example, or a pair of them."""

    @property
    def line(self) -> int: ...


class Measured(Protocol):
    """What an example becomes: a row, or a pair of them."""

    @property
    def longest_tokens(self) -> int: ...


Source = TypeVar("Source", bound=OnALine)
Made = TypeVar("Made", bound=Measured)


class Row(NamedTuple):
    """One tokenised example."""

    input_ids: list[int]
    prompt_tokens: int
    """How many of `input_ids` belong to the prompt. They carry no loss."""

    @property
    def longest_tokens(self) -> int:
        """All tokens of the row, which must fit into the model's context."""
        return len(self.input_ids)


class Tokenized(NamedTuple, Generic[Source, Made]):
    """The examples that fit, each with its row."""

    examples: list[Source]
    rows: list[Made]
    too_long: list[int]
    """The lines of the examples that were left out because they have too many tokens."""

    def only(self, lines: set[int]) -> "Tokenized[Source, Made]":
        """Those of these lines."""
        both = [(example, row) for example, row in zip(self.examples, self.rows, strict=True) if example.line in lines]
        return Tokenized([example for example, _ in both], [row for _, row in both], [])

    def parted(self, held_out_fraction: float, seed: int) -> "tuple[Tokenized[Source, Made], Tokenized[Source, Made]]":
        """Those to learn, and those to measure on. The fraction is of what fits; see `split`."""
        all_lines = {example.line for example in self.examples}
        held_out = split(all_lines, held_out_fraction, seed)
        return self.only(all_lines - held_out), self.only(held_out)


def tokenize(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> Tokenized[Example, Row]:
    """Rows in the tokenizer's own chat template. Examples of more than ``max_tokens`` are left out.

    A shortened example would teach the model to stop in the middle. Raises `DataError` if no example fits, or where the template refuses one.
    """
    return fitting(examples, [encode(example, tokenizer) for example in examples], max_tokens)


def fitting(examples: Sequence[Source], rows: Sequence[Made], max_tokens: int) -> Tokenized[Source, Made]:
    """The examples of at most ``max_tokens``. Raises `DataError` if there are none."""
    both = list(zip(examples, rows, strict=True))
    kept = [(example, row) for example, row in both if row.longest_tokens <= max_tokens]
    if not kept:
        shortest = min(row.longest_tokens for row in rows)
        raise DataError(
            f"None of the {len(both)} examples fits: the shortest has {shortest} tokens, and the limit is {max_tokens}.",
            "Shorten the examples, raise the recipe's max_tokens, or choose a base with a longer context.",
        )
    too_long = [example.line for example, row in both if row.longest_tokens > max_tokens]
    return Tokenized([example for example, _ in kept], [row for _, row in kept], too_long)


def split(lines: Iterable[int], held_out_fraction: float, seed: int) -> set[int]:
    """The lines to hold out, the same for the same seed: at least one, and never all. A conversation's turns have one line, so they stay together."""
    known = sorted(set(lines))
    if len(known) < 2:
        raise DataError("There is only one example, so none can be held out for measuring.", "Add examples, or give --eval-data.")
    held = min(len(known) - 1, max(1, round(held_out_fraction * len(known))))
    return set(random.Random(seed).sample(known, held))  # noqa: S311 (a split, not a secret)


def described(train: Sequence[Row], held_out: Sequence[Row], too_long: Sequence[int], limit: int) -> str:
    """What a run is about to learn, in one line.

    >>> described([Row([1] * 8, 6), Row([1] * 4, 1)], [Row([1, 2], 1)], [7], 8)
    '2 examples to train on: 12 tokens, 5 of them in answers, the longest 8; 1 held out; 1 left out, longer than 8 tokens (line 7)'
    """
    tokens, learnt = (
        sum(len(row.input_ids) for row in train),
        sum(len(row.input_ids) - max(1, row.prompt_tokens) for row in train),
    )
    longest = max(len(row.input_ids) for row in train)
    words = f"{len(train):,} examples to train on: {tokens:,} tokens, {learnt:,} of them in answers, the longest {longest:,}; "
    return words + f"{len(held_out):,} held out; {left_out(too_long, limit)}"


def left_out(too_long: Sequence[int], limit: int) -> str:
    """
    >>> left_out([7], 8), left_out([], 8)
    ('1 left out, longer than 8 tokens (line 7)', '0 left out')
    """
    words = f"{len(too_long):,} left out"
    if not too_long:
        return words
    named = sorted(set(too_long))
    lines = ", ".join(map(str, named[:NAMED_LINES])) + (", …" if len(named) > NAMED_LINES else "")
    return f"{words}, longer than {limit:,} tokens (line{'s' * (len(named) > 1)} {lines})"


# one example in the model's own words


def encode(example: Example, tokenizer: Any) -> Row:
    """The prompt ends where the model starts to answer at inference. The completion ends with the template's end of turn."""
    prompt, whole = _rendered(example, tokenizer)
    if not whole.startswith(prompt):
        raise DataError(
            f"Line {example.line}: {_not_appending(prompt)}.", "Training needs a template that only appends. Choose another base."
        )
    if (left_out := _left_out(example, prompt, whole)) is not None:
        raise DataError(
            f"Line {example.line}: the base's chat template leaves out {left_out}.",
            "Remove it from the data, or choose a base whose template knows it.",
        )
    before, ids = _ids(prompt, tokenizer), _ids(whole, tokenizer)
    if (
        ids[: len(before)] != before
    ):  # a token spans the end of the prompt and the start of the answer; no prompt ends within a token
        ids = before + _ids(whole[len(prompt) :], tokenizer)
    return Row(ids, len(before))


def _rendered(example: Example, tokenizer: Any) -> tuple[str, str]:
    """The prompt as the model gets it, and the prompt with the answer."""
    options: dict[str, Any] = {"tokenize": False, **({"tools": list(example.tools)} if example.tools else {})}
    try:
        return (
            tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, **options),
            tokenizer.apply_chat_template(example.prompt + example.completion, **options),
        )
    except Exception as error:  # a template is a program of the base's makers, and raises what it likes
        raise DataError(
            f"Line {example.line}: the base's chat template refuses it: {error}.",
            "Write the conversation as the base expects it, or choose another base.",
        ) from error


def _not_appending(prompt: str) -> str:
    if re.search(r"<\W*(think|thought|reasoning)\w*\W*>\s*$", prompt, re.IGNORECASE):
        return (
            f"the base's chat template opens the model's thinking ({prompt.split()[-1]!r}) where it starts to answer, and drops it where an "
            "answer follows"
        )
    return "the base's chat template writes the prompt in another way if an answer follows"


def _ids(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written the special tokens


def _left_out(example: Example, prompt: str, whole: str) -> str | None:
    """What the rendered text does not say; None if it says all. It looks for the longest word of each text: templates strip and escape some."""
    asked = [(message["role"], message["content"]) for message in example.prompt if message["role"] != "assistant"]
    for role, content in asked:
        if not _says(prompt, content):
            return f"the message by {role}"
    for tool in example.tools:
        if tool["function"]["name"] not in prompt:
            return "the tools"
    answer, [learnt] = whole[len(prompt) :], example.completion
    if any(call["function"]["name"] not in answer for call in learnt.get("tool_calls", [])):
        return "the calls of tools"
    if not _says(answer, learnt.get("reasoning_content", "")):
        return "the answer's reasoning_content"
    return None if _says(answer, learnt["content"]) else "a part of the answer"


def _says(text: str, content: str) -> bool:
    """
    >>> _says("<user>It is high.", " It's high. "), _says("<user>hi", "high")
    (True, False)
    """
    words = re.findall(r"\w+", content)
    if not words:
        return True
    longest = max(words, key=len)
    return longest in text or json.dumps(longest)[1:-1] in text
