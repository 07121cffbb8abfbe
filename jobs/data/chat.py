"""Conversations: what a line may hold, and the answers in it that a model learns.

A line has one of two forms, which may be mixed::

    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Seedling."}]}
    {"prompt": "Who are you?", "completion": "I am Seedling."}

The first is OpenAI's chat format (https://platform.openai.com/docs/guides/supervised-fine-tuning), with tools and tool calls. In the second,
prompt and completion may also be lists of messages, as TRL has them. The loss is on every assistant message, except those with
``"weight": 0`` and those of a prompt. A null means that the key is absent.

This file checks every line before a job imports Ray or torch. So a mistake in the last line shows within seconds.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from cluster.errors import DataError
from jobs import sources
from jobs.data.lines import Problem, kind, objects

ROLES = ("system", "developer", "user", "assistant", "tool")
FORMS = 'Write {"messages": [...]} or {"prompt": ..., "completion": ...}.'
EVERY = {"role", "content", "name"}
"""The keys of every message."""
KEYS = {
    "assistant": EVERY | {"weight", "tool_calls", "function_call", "refusal", "reasoning_content", "reasoning"},
    "tool": EVERY | {"tool_call_id"},
}
TOOL_KEYS = {"tools", "functions", "parallel_tool_calls"}
"""What a line may have besides, see `tools_of`."""
TOOL = '{"type": "function", "function": {"name": "...", "parameters": {...}}}'
CALL = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}'

One = TypeVar("One")

Message = dict[str, Any]
"""As chat templates read them: ``role``, ``content`` (a string), and where there are any ``name``, ``tool_calls``, ``tool_call_id``,
``reasoning_content``. The arguments of a call are an object."""


class Example(NamedTuple):
    """One assistant turn to learn, in TRL's conversational prompt-completion form."""

    prompt: list[Message]
    completion: list[Message]
    """Exactly one assistant message."""
    line: int
    """Where it came from, counted from 1. A conversation with several assistant turns gives several examples."""
    tools: tuple[dict[str, Any], ...] = ()
    """The tools that the model may call, as in a request."""


class Dataset(NamedTuple, Generic[One]):
    source: str
    sha256: str
    """Of the file's bytes, inflated."""
    examples: list[One]


def read(source: str, fetch: sources.Fetch = sources.local) -> Dataset[Example]:
    """Read and check a path, URL or upload. Raises `DataError` naming the file, the line, what is wrong and what to do."""
    return dataset(source, fetch, parse, FORMS)


def dataset(source: str, fetch: sources.Fetch, parse: Callable[[bytes, str], Iterable[One]], forms: str) -> Dataset[One]:
    """What ``parse`` finds in a file. Raises `DataError` where it finds nothing; ``forms`` says what a line looks like."""
    raw, name = fetch(source), sources.title(source)
    examples = list(parse(raw, name))
    if not examples:
        raise DataError(f"{name} is empty.", f"Put at least one example in it, one per line. {forms}")
    return Dataset(name, hashlib.sha256(raw).hexdigest(), examples)


def parse(raw: bytes, source: str) -> Iterator[Example]:
    """Every example in a file's bytes."""
    return objects(raw, source, _examples)


def _examples(decoded: dict[str, Any], number: int) -> Iterator[Example]:
    value = present(decoded)
    tools = tuple(tools_of(value))
    for prompt, answer in turns(conversation(value)):
        yield Example(prompt, [answer], number, tools)


def present(value: dict[str, Any]) -> dict[str, Any]:
    """The keys that have a value. OpenAI's libraries write null for an absent one."""
    return {key: each for key, each in value.items() if each is not None}


# one line


def conversation(value: dict[str, Any]) -> list[Message]:
    """Either form as checked messages. Those of assistants have ``"weight"``, 0 or 1."""
    rest = set(value) - TOOL_KEYS
    if rest == {"messages"}:
        checked = messages(value["messages"], "messages")
    elif rest == {"prompt", "completion"}:
        checked = context(side("user", value["prompt"], "prompt")) + side("assistant", value["completion"], "completion")
    else:
        raise Problem(f"the keys are {', '.join(map(repr, value)) or 'none'}", FORMS)
    if checked[-1]["role"] != "assistant":
        raise Problem(
            f"the last message is by {checked[-1]['role']}", "End with the assistant's answer that the model should learn."
        )
    check_calls(checked)
    return checked


def side(role: str, value: Any, where: str) -> list[Message]:
    """A text by ``role``, or messages."""
    return messages(value, where) if isinstance(value, list) else [message({"role": role, "content": value}, where)]


def context(checked: list[Message]) -> list[Message]:
    """Messages that nobody learns: assistants' have the weight 0."""
    return [{**one, "weight": 0} if one["role"] == "assistant" else one for one in checked]


def messages(value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Problem(f"{where!r} is {'empty' if value == [] else f'a JSON {kind(value)}'}", "It must be a list of messages.")
    return [message(each, f"{where}[{i}]") for i, each in enumerate(value)]


def turns(checked: list[Message]) -> list[tuple[list[Message], Message]]:
    """(everything before, the answer) for each assistant message to learn."""
    all_ = plain(checked)
    first_user = next((i for i, one in enumerate(all_) if one["role"] == "user"), len(all_))
    learnt = [i for i, one in enumerate(checked) if one.get("weight") == 1]
    if not learnt:
        raise Problem(
            "every assistant message has weight 0", "So there is nothing to learn from it. Remove the line, or a weight."
        )
    if learnt[0] < first_user:
        raise Problem("an assistant message comes before any user message", "Start with what the user says.")
    return [(all_[:i], all_[i]) for i in learnt]


def plain(checked: list[Message]) -> list[Message]:
    """Messages as a request has them, without weights."""
    return [{key: each for key, each in one.items() if key != "weight"} for one in checked]


# one message


def message(value: Any, where: str) -> Message:
    """A checked message in the form that chat templates read. Raises `Problem` naming the place."""
    if not isinstance(value, dict):
        raise Problem(f"{where} is a JSON {kind(value)}", 'A message is {"role": "...", "content": "..."}.')
    value = present(value)
    role = value.get("role")
    if role is None:
        raise Problem(f"{where} has no 'role'", f"Use one of: {', '.join(ROLES)}.")
    if role == "function":  # OpenAI's older form
        value = {**value, "role": "tool"}
        role = "tool"
    if role not in ROLES:
        raise Problem(f"{where} has the unknown role {role!r}", f"Use one of: {', '.join(ROLES)}.")
    if unknown := set(value) - KEYS.get(role, EVERY):
        if unknown == {"weight"}:
            raise Problem(
                f"{where} has weight {value['weight']!r}", "Only assistant messages have one: 0 (do not learn it) or 1."
            )
        known = ", ".join(sorted(KEYS.get(role, EVERY)))
        raise Problem(f"{where} has the unknown key {min(unknown)!r}", f"A message by {role} has: {known}.")
    made: Message = {"role": role, "content": _content(value, where)}
    for key in ("name", "tool_call_id"):
        if key in value:
            made[key] = _text(value[key], f"{where}.{key}")
    if role == "assistant":
        made |= _answer(value, made["content"], where)
    return made


def _answer(value: dict[str, Any], content: str, where: str) -> dict[str, Any]:
    """What only an assistant's message has."""
    weight = value.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Problem(f"{where} has weight {weight!r}", "Only assistant messages have one: 0 (do not learn it) or 1.")
    made: dict[str, Any] = {"weight": int(weight)}
    if calls := _calls(value, where):
        made["tool_calls"] = calls
    thought = value.get("reasoning_content", value.get("reasoning"))
    if thought is not None:  # chat templates know it by either name
        made |= dict.fromkeys(("reasoning_content", "reasoning"), _text(thought, f"{where}.reasoning_content"))
    if not content.strip() and not calls:
        raise Problem(f"{where}.content is empty", "Write the text, or remove the line.")
    return made


def _content(value: dict[str, Any], where: str) -> str:
    """The text of a message. Parts are joined by a newline, as vLLM joins those of a request."""
    role, content = value["role"], value.get("content", value.get("refusal"))
    if content is None:
        if role == "tool" or "tool_calls" in value or "function_call" in value:  # a tool may have nothing to say
            return ""
        raise Problem(
            f"{where} has no 'content'", "Each message needs 'role' and 'content'; an answer may have 'tool_calls' instead."
        )
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    content = _text(content, f"{where}.content")
    if not content.strip() and role not in ("assistant", "tool"):
        raise Problem(f"{where}.content is empty", "Write the text, or remove the line.")
    return content


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise Problem(f"{where} is a JSON {kind(part)}", 'A part is {"type": "text", "text": "..."}.')
    named = part.get("type")
    if named not in ("text", "refusal"):
        raise Problem(f"{where} has the type {named!r}", 'Only text can be learnt: a part is {"type": "text", "text": "..."}.')
    return _text(part.get(named), f"{where}.{named}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Problem(f"{where} is a JSON {kind(value)}", "It must be a string.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Problem(f"{where} holds half of a surrogate pair", "Write the character itself, or both halves.")
    return value


# tools


def tools_of(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tools of a line, also from ``functions``, OpenAI's older form."""
    if not isinstance(value.get("parallel_tool_calls", True), bool):
        raise Problem("'parallel_tool_calls' is no boolean", "Write true or false.")
    older = [{"type": "function", "function": each} for each in _list(value, "functions")]
    for i, tool in enumerate([*_list(value, "tools"), *older]):
        tool = present(tool) if isinstance(tool, dict) else {}
        function = tool.get("function")
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise Problem(f"tools[{i}] is no function", f"A tool is {TOOL}.")
        _text(function.get("name"), f"tools[{i}].function.name")
        yield {"type": "function", "function": present(function)}


def _list(value: dict[str, Any], key: str) -> list[Any]:
    found = value.get(key, [])
    if not isinstance(found, list):
        raise Problem(f"{key!r} is a JSON {kind(found)}", f"It must be a list. A tool is {TOOL}.")
    return found


def _calls(value: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls of an answer, with their arguments as objects: that is how vLLM gives them to a chat template."""
    if "function_call" in value:  # OpenAI's older form
        value = {"tool_calls": [{"type": "function", "function": value["function_call"]}]}
    return [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(_list(value, "tool_calls"))]


def _call(call: Any, where: str) -> dict[str, Any]:
    call = present(call) if isinstance(call, dict) else {}
    function = call.get("function")
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise Problem(f"{where} is no call of a function", f"A call is {CALL}.")
    name = _text(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise Problem(f"{where}.function.arguments is not JSON: {error}", f"A call is {CALL}.") from None
    if not isinstance(arguments, dict):
        raise Problem(f"{where}.function.arguments is a JSON {kind(arguments)}", f"It must be an object: a call is {CALL}.")
    id = {"id": _text(call["id"], f"{where}.id")} if "id" in call else {}
    return {**id, "type": "function", "function": {"name": name, "arguments": arguments}}


def check_calls(checked: list[Message]) -> None:
    """Raise `Problem` where a tool answers a call that nobody made."""
    made: set[str] = set()
    for i, one in enumerate(checked):
        made |= {call["id"] for call in one.get("tool_calls", []) if "id" in call}
        id = one.get("tool_call_id")
        if id is not None and id not in made:
            raise Problem(
                f"messages[{i}] answers the call {id!r}, which no message before it makes", "Correct its 'tool_call_id'."
            )
