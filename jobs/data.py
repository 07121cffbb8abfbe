"""Fine-tuning data: read, check, split, tokenise.

A file is JSON lines, each in one of two forms, which may be mixed::

    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Seedling."}]}
    {"prompt": "Who are you?", "completion": "I am Seedling."}

The first is OpenAI's chat format (https://platform.openai.com/docs/guides/supervised-fine-tuning). The loss is on every assistant
message, except those with ``"weight": 0``. This file checks every line before a job imports Ray or torch. So a mistake in the last line
shows within seconds.

``python -m jobs.data convert IN OUT`` turns question/answer JSON lines (as GSM8K's) or ``sentence<TAB>label`` lines (as SST-2's)
into that format.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cluster.errors import DataError
from cluster.jobspec import Parser
from jobs import main, sources

ROLES = ("system", "user", "assistant")
FORMS = 'Write {"messages": [...]} or {"prompt": "...", "completion": "..."}.'

Message = dict[str, str]


class Example(NamedTuple):
    """One assistant turn to learn, in TRL's conversational prompt-completion form."""

    prompt: list[Message]
    completion: list[Message]
    """Exactly one assistant message."""
    line: int
    """Where it came from, counted from 1. A conversation with several assistant turns gives several examples."""


class Dataset(NamedTuple):
    source: str
    sha256: str
    """Of the file's bytes."""
    examples: list[Example]


class Row(NamedTuple):
    """One tokenised example."""

    input_ids: list[int]
    prompt_tokens: int
    """How many of `input_ids` belong to the prompt. They carry no loss."""


class Problem(Exception):
    """What is wrong with one line, and what the user can do."""

    def __init__(self, what: str, do: str) -> None:
        super().__init__(what)
        self.what, self.do = what, do


# read


def read(source: str, fetch: sources.Fetch = sources.local) -> Dataset:
    """Read and check a path, URL or upload. Raises `DataError` naming the file, the line, what is wrong and what to do."""
    raw, name = fetch(source), sources.title(source)
    examples = list(parse(raw, name))
    if not examples:
        raise DataError(f"{name} is empty.", f"Put at least one example in it, one per line. {FORMS}")
    return Dataset(name, hashlib.sha256(raw).hexdigest(), examples)


def parse(raw: bytes, source: str) -> Iterator[Example]:
    """Every example in a file's bytes. Blank lines are skipped; only a newline ends a line (JSON strings may hold U+2028)."""
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            for prompt, answer in turns(conversation(decode(line))):
                yield Example(prompt, [answer], number)
        except Problem as problem:
            raise DataError(f"{source}, line {number}: {problem.what}.", problem.do) from None


def decode(line: bytes) -> dict[str, Any]:
    """The JSON object on a line."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(
            f"byte {error.start + 1} is not UTF-8 text", "Is this a binary or compressed file? Save it as UTF-8."
        ) from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = "Write one object per line. A JSON array or an indented file is not JSON lines."
        raise Problem(f"not JSON: {error}", hint) from None
    if not isinstance(value, dict):
        raise Problem(f"a JSON {kind(value)} where an object should be", FORMS)
    return value


# check


def conversation(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Either form as checked messages, each ``{"role", "content"}`` and for assistants ``"weight"``."""
    if set(value) == {"prompt", "completion"}:
        return [message("user", value["prompt"], "prompt"), message("assistant", value["completion"], "completion")]
    if set(value) != {"messages"}:
        raise Problem(f"the keys are {', '.join(map(repr, value)) or 'none'}", FORMS)
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        wrong = "empty" if isinstance(messages, list) else f"a JSON {kind(messages)}"
        raise Problem(f"'messages' is {wrong}", "It must be a list of messages.")
    checked = [check(each, f"messages[{i}]") for i, each in enumerate(messages)]
    if checked[-1]["role"] != "assistant":
        raise Problem(
            f"the last message is by {checked[-1]['role']}", "End with the assistant's answer that the model should learn."
        )
    return checked


def check(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Problem(f"{where} is a JSON {kind(value)}", 'A message is {"role": "...", "content": "..."}.')
    if missing := {"role", "content"} - set(value):
        raise Problem(f"{where} has no {' and no '.join(sorted(map(repr, missing)))}", "Each message needs 'role' and 'content'.")
    if unknown := set(value) - {"role", "content", "weight"}:
        raise Problem(
            f"{where} has the unknown key {min(unknown)!r}", "A message has 'role', 'content' and, by assistants, 'weight'."
        )
    role = value["role"]
    if role not in ROLES:
        raise Problem(f"{where} has the unknown role {role!r}", f"Use one of: {', '.join(ROLES)}.")
    if "weight" not in value:
        return message(role, value["content"], f"{where}.content")
    if role != "assistant" or type(value["weight"]) is not int or value["weight"] not in (0, 1):
        raise Problem(f"{where} has weight {value['weight']!r}", "Only assistant messages have one: 0 (do not learn it) or 1.")
    return {**message(role, value["content"], f"{where}.content"), "weight": value["weight"]}


def message(role: str, content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, str):
        raise Problem(f"{where} is a JSON {kind(content)}", "It must be a string.")
    if not content.strip():
        raise Problem(f"{where} is empty", "Write the text, or remove the line.")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise Problem(f"{where} holds half of a surrogate pair", "Write the character itself, or both halves.")
    return {"role": role, "content": content}


def turns(messages: list[dict[str, Any]]) -> list[tuple[list[Message], Message]]:
    """(everything before, the answer) for each assistant message to learn."""
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    first_user = next((i for i, m in enumerate(plain) if m["role"] == "user"), len(plain))
    learnt = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) == 1]
    if not learnt:
        raise Problem(
            "every assistant message has weight 0", "So there is nothing to learn from it. Remove the line, or a weight."
        )
    if learnt[0] < first_user:
        raise Problem("an assistant message comes before any user message", "Start with what the user says.")
    return [(plain[:i], plain[i]) for i in learnt]


def kind(value: Any) -> str:
    """JSON's name for the type of a decoded value."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


# split and tokenise


def split(examples: list[Example], held_out_fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out), the same for the same seed. At least one line each; a conversation's turns stay together."""
    lines = sorted({example.line for example in examples})
    if len(lines) < 2:
        raise DataError("There is only one example, so none can be held out for measuring.", "Add examples, or give --eval-data.")
    held = min(len(lines) - 1, max(1, round(held_out_fraction * len(lines))))
    chosen = set(random.Random(seed).sample(lines, held))  # noqa: S311 (a split, not a secret)
    return [e for e in examples if e.line not in chosen], [e for e in examples if e.line in chosen]


def tokenize(examples: list[Example], tokenizer: Any, max_tokens: int) -> tuple[list[Row], int]:
    """Rows in the tokenizer's own chat template, and how many examples were left out because they are longer than ``max_tokens``.

    A shortened example would teach the model to stop in the middle. Raises `DataError` if no example fits.
    """
    rows = [encode(example, tokenizer) for example in examples]
    fitting = [row for row in rows if len(row.input_ids) <= max_tokens]
    if not fitting:
        shortest = min(len(row.input_ids) for row in rows)
        raise DataError(
            f"None of the {len(rows)} examples fits: the shortest has {shortest} tokens, and the limit is {max_tokens}.",
            "Shorten the examples, raise the recipe's max_tokens, or choose a base with a longer context.",
        )
    return fitting, len(rows) - len(fitting)


def encode(example: Example, tokenizer: Any) -> Row:
    """The prompt ends where the model starts to answer at inference. The completion ends with the template's end of turn."""
    options: dict[str, Any] = {"tokenize": True, "return_dict": False}
    prompt = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template(example.prompt + example.completion, **options)
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"Line {example.line}: the model's chat template writes the prompt in another way if an answer follows.",
            "Training needs a template that only appends. Choose another base.",
        )
    return Row(whole, len(prompt))


# convert


def convert(source: str, labels: list[str]) -> Iterator[str]:
    """Chat JSON lines from question/answer JSON lines or ``sentence<TAB>label`` lines.

    With ``labels``, the label ``0`` becomes the first word and so on; SST-2's ``sentence<TAB>label`` header is skipped.
    """
    for number, line in enumerate(sources.local(source).split(b"\n"), start=1):
        if not line.strip() or line.rstrip() == b"sentence\tlabel":
            continue
        try:
            question, answer = pair(line)
        except Problem as problem:
            raise DataError(f"{source}, line {number}: {problem.what}.", problem.do) from None
        if labels and answer.isdigit() and int(answer) < len(labels):
            answer = labels[int(answer)]
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": chat}, ensure_ascii=False)


def pair(line: bytes) -> tuple[str, str]:
    if not line.startswith(b"{"):
        sentence, tab, label = line.decode("utf-8", "replace").strip().rpartition("\t")
        if not tab:
            raise Problem("no tab", "Write sentence<TAB>label.")
        return sentence.strip(), label
    value = decode(line)
    if not (isinstance(value.get("question"), str) and isinstance(value.get("answer"), str)):
        raise Problem("no question and answer", 'Write {"question": "...", "answer": "..."}.')
    return value["question"], value["answer"]


def run() -> None:
    parser = Parser("jobs.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verb = parser.add_subparsers(required=True).add_parser("convert", help="question/answer JSON lines or TSV → chat JSON lines")
    verb.add_argument("source", help="path or URL")
    verb.add_argument("target", type=Path)
    verb.add_argument("--labels", default="", help="words for the labels 0, 1, …: --labels negative,positive")
    arguments = parser.parse_args()
    lines = list(convert(arguments.source, [word for word in arguments.labels.split(",") if word]))
    try:
        arguments.target.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    except OSError as error:
        raise DataError(
            f"{arguments.target} cannot be written: {error.strerror}.", "Choose a path in a folder that exists."
        ) from error
    print(f"{len(lines)} examples in {arguments.target}")


if __name__ == "__main__":
    main(run)
