"""Preference pairs: two answers to one prompt, of which the first is preferred.

A line has one of three forms, which may be mixed::

    {"input": {"messages": [{"role": "user", "content": "Tide?"}]},
     "preferred_output": [{"role": "assistant", "content": "High, until six."}],
     "non_preferred_output": [{"role": "assistant", "content": "Look yourself."}]}
    {"prompt": "Tide?", "chosen": "High, until six.", "rejected": "Look yourself."}
    {"chosen": [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "High, until six."}],
     "rejected": [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": "Look yourself."}]}

The first is OpenAI's (https://platform.openai.com/docs/guides/direct-preference-optimization), with tools in its ``input``. The others are TRL's,
with tools beside them: prompt and answers are texts or messages, and without a prompt it is what both sides begin with. What a message may hold is
what `jobs.data.chat` takes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jobs import sources
from jobs.data import chat, rows
from jobs.data.chat import Dataset, Example, Message
from jobs.data.lines import Problem, kind, objects
from jobs.data.rows import Row, Tokenized

OPENAI = {"input", "preferred_output", "non_preferred_output"}
EXPLICIT, IMPLICIT = {"prompt", "chosen", "rejected"}, {"chosen", "rejected"}
FORMS = (
    'Write {"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}, '
    'or {"prompt": ..., "chosen": ..., "rejected": ...}.'
)
ANSWER = 'An answer is one message: [{"role": "assistant", "content": "..."}].'


class Pair(NamedTuple):
    """Two answers to the same prompt."""

    chosen: Example
    rejected: Example

    @property
    def line(self) -> int:
        """Where the pair came from, counted from 1."""
        return self.chosen.line


class PairRow(NamedTuple):
    """A pair's two rows. Each holds the prompt."""

    chosen: Row
    rejected: Row

    @property
    def longest_tokens(self) -> int:
        """The tokens of the longer side: each must fit into the model's context."""
        return max(side.longest_tokens for side in self)

    @property
    def tokens(self) -> int:
        """The tokens of both sides."""
        return sum(len(side.input_ids) for side in self)


# read


def read(source: str, fetch: sources.Fetch = sources.local) -> Dataset[Pair]:
    """Read and check a path, URL or upload. Raises `DataError` naming the file, the line, what is wrong and what to do."""
    return chat.dataset(source, fetch, parse, FORMS)


def parse(raw: bytes, source: str) -> Iterator[Pair]:
    """Every pair in a file's bytes.

    >>> [pair] = parse(b'{"prompt": "Tide?", "chosen": "High.", "rejected": "Low."}', "pairs.jsonl")
    >>> pair.chosen.prompt, pair.chosen.completion, pair.rejected.completion
    ([{'role': 'user', 'content': 'Tide?'}], [{'role': 'assistant', 'content': 'High.'}], [{'role': 'assistant', 'content': 'Low.'}])
    """
    return objects(raw, source, lambda value, number: [_pair(chat.present(value), number)])


def _pair(value: dict[str, Any], number: int) -> Pair:
    keys = set(value) - chat.TOOL_KEYS
    if keys == OPENAI:
        if len(keys) < len(value):
            raise Problem("the tools stand beside 'input'", "Write them within it, as in a request.")
        value, prompt, answers = _openai(value)
    elif keys == EXPLICIT:
        prompt = chat.side("user", value["prompt"], "prompt")
        answers = [(chat.side("assistant", value[key], key), key) for key in ("chosen", "rejected")]
    elif keys == IMPLICIT:
        prompt, answers = _implicit(value)
    else:
        raise Problem(f"the keys are {', '.join(map(repr, value)) or 'none'}", FORMS)
    tools = tuple(chat.tools_of(value))
    chosen, rejected = (_example(prompt, answer, where, tools, number) for answer, where in answers)
    if chosen == rejected:
        raise Problem("both answers are the same", "Nothing is preferred then. Correct one of them, or remove the line.")
    return Pair(chosen, rejected)


Answers = list[tuple[list[Message], str]]
"""The preferred answer and the other one, each with the key that it comes from."""


def _openai(value: dict[str, Any]) -> tuple[dict[str, Any], list[Message], Answers]:
    """The object that may have tools, the prompt, and the answers."""
    if not isinstance(value["input"], dict):
        raise Problem(f"'input' is a JSON {kind(value['input'])}", 'It must be an object: {"messages": [...]}.')
    asked = chat.present(value["input"])
    if set(asked) - chat.TOOL_KEYS != {"messages"}:
        known = ", ".join(["messages", *sorted(chat.TOOL_KEYS)])
        raise Problem(
            f"the keys of 'input' are {', '.join(map(repr, asked)) or 'none'}", f"It has messages, and may have: {known}."
        )
    answers = [(chat.messages(value[key], key), key) for key in ("preferred_output", "non_preferred_output")]
    return asked, chat.messages(asked["messages"], "input.messages"), answers


def _implicit(value: dict[str, Any]) -> tuple[list[Message], Answers]:
    """The prompt that both conversations begin with, and the answers that they end with."""
    chosen, rejected = (chat.messages(value[key], key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        at = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
        common = f"differ from message {at} on, before their last one" if at else "have no beginning in common"
        raise Problem(f"'chosen' and 'rejected' {common}", "Without a 'prompt' they differ in the last message only: the answer.")
    if len(chosen) == 1:
        raise Problem("there is no prompt before the answers", "Add a 'prompt', or the same messages to both sides.")
    return chosen[:-1], [(chosen[-1:], "chosen"), (rejected[-1:], "rejected")]


def _example(prompt: list[Message], answer: list[Message], where: str, tools: tuple[dict[str, Any], ...], number: int) -> Example:
    if len(answer) > 1:
        raise Problem(f"{where!r} has {len(answer)} messages", ANSWER)
    if answer[0]["role"] != "assistant":
        raise Problem(f"the answer in {where!r} is by {answer[0]['role']}", ANSWER)
    checked = chat.context(prompt) + answer
    chat.check_calls(checked)
    [(before, learnt)] = chat.turns(checked)
    return Example(before, [learnt], number, tools)


# tokenise


def tokenize(pairs: Sequence[Pair], tokenizer: Any, max_tokens: int) -> Tokenized[Pair, PairRow]:
    """Rows in the tokenizer's own chat template. A pair of which a side has more than ``max_tokens`` is left out.

    Raises `DataError` if no pair fits, or where the template refuses one.
    """
    made = [PairRow(rows.encode(pair.chosen, tokenizer), rows.encode(pair.rejected, tokenizer)) for pair in pairs]
    return rows.fitting(pairs, made, max_tokens)


def described(train: Sequence[PairRow], held_out: Sequence[PairRow], too_long: Sequence[int], limit: int) -> str:
    """What a run is about to learn, in one line.

    >>> described([PairRow(Row([1] * 8, 6), Row([1] * 7, 6))], [], [3], 8)
    '1 pairs to learn from: 15 tokens, the longest answer with its prompt 8; 0 held out; 1 left out, longer than 8 tokens (line 3)'
    """
    tokens, longest = sum(pair.tokens for pair in train), max(pair.longest_tokens for pair in train)
    words = f"{len(train):,} pairs to learn from: {tokens:,} tokens, the longest answer with its prompt {longest:,}; "
    return words + f"{len(held_out):,} held out; {rows.left_out(too_long, limit)}"
