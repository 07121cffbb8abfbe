"""A teacher's own answers to the prompts of a data file, from the replicas that serve it: sequence-level distillation (Kim and Rush 2016).

The answers are greedy and of one exact version. They go to the store as they come, so a run that is resumed asks only for what is missing. Few
questions are under way at a time, and where the pool is full they wait: clients go before a job.
"""

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.client import Client
from cluster.errors import AnswerTimeout, ContextExceeded, DataError, ModelNotFound, Quarantined, SpringtideError
from cluster.store.objects import Store
from cluster.types import VersionId
from jobs.data.chat import Example, Message, message, plain
from jobs.data.lines import Problem

CONCURRENT = 8
"""Questions under way at a time."""
PART = 128
"""Answers in one object of the store."""
WAITS_S = (1, 2, 5, 10, 20, 30, 60, 60)
"""How long a question waits before it is asked again, where the pool has no room or a replica was lost."""
PASSING = (429, 502, 503)
"""HTTP statuses of errors that pass by themselves."""
KEPT = ("role", "content", "tool_calls", "reasoning_content", "reasoning")
"""Of what an engine answers, what a model can learn."""

Answer = Message | None
"""None where the teacher has no whole answer to the prompt."""


def check_served(pool: Client, teacher: VersionId) -> None:
    """Raise `ModelNotFound` where nothing serves the version now."""
    if str(teacher) not in (served := pool.served()):
        raise ModelNotFound(
            f"{teacher} is not served.", f"Publish it, or add a fleet for it. Served are: {', '.join(served)}.", param="teacher"
        )


def answered(
    pool: Client, store: Store, run: str, teacher: VersionId, asked: Sequence[Example], note: Callable[[str], None]
) -> list[Example]:
    """The examples with the teacher's answers. Those without a whole answer are left out, and the log says how many.

    Raises a `SpringtideError` if the pool stays away for minutes. What was answered until then stays in the run. Raises `DataError` for a prompt
    that the teacher refuses, by its line.
    """
    known = kept(store, run)
    missing = [at for at in range(len(asked)) if at not in known]
    threads = ThreadPoolExecutor(CONCURRENT)
    try:
        for first in range(0, len(missing), PART):
            part = missing[first : first + PART]
            found = dict(zip(part, threads.map(lambda at: answer(pool, teacher, asked[at]), part), strict=True))
            keep(store, run, found)
            known |= found
            note(f"{teacher} has answered {len(known):,} of {len(asked):,} prompts")
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # a job that is cancelled has no time to wait for answers
    whole = [example._replace(completion=[said]) for at, example in enumerate(asked) if (said := known[at]) is not None]
    print(
        f"{len(whole):,} answers by {teacher}; {len(asked) - len(whole):,} prompts left out, without a whole answer", flush=True
    )
    return whole


# one question


def answer(pool: Client, teacher: VersionId, example: Example) -> Answer:
    """Ask one question, and again where the pool has no room."""
    waits_s = iter(WAITS_S)
    while True:
        try:
            return whole_answer(pool.chat(request(teacher, example)).choice)
        except (ContextExceeded, AnswerTimeout, Quarantined):
            return None
        except SpringtideError as error:
            if error.status == 400:
                raise DataError(f"Line {example.line}: the teacher refuses it: {error}", "Remove the line.") from error
            wait_s = next(waits_s, None)
            if error.status not in PASSING or wait_s is None:
                raise
            time.sleep(wait_s)


def request(teacher: VersionId, example: Example) -> dict[str, Any]:
    """
    >>> request(VersionId("seedling", 1), Example([{"role": "user", "content": "Tide?"}], [], 1))
    {'model': 'seedling@1', 'messages': [{'role': 'user', 'content': 'Tide?'}], 'temperature': 0}
    """
    body = {"model": str(teacher), "messages": [sent(one) for one in example.prompt], "temperature": 0}
    return {**body, "tools": list(example.tools)} if example.tools else body


def sent(one: Message) -> Message:
    """A message in OpenAI's form, in which the arguments of a call are a string."""
    if "tool_calls" not in one:
        return one
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in one["tool_calls"]
    ]
    return {**one, "tool_calls": calls}


def whole_answer(choice: dict[str, Any]) -> Answer:
    """What an engine's choice teaches; None where it says nothing or was cut off, which would teach to stop in the middle.

    >>> whole_answer({"finish_reason": "stop", "message": {"role": "assistant", "content": "High.", "audio": None}})
    {'role': 'assistant', 'content': 'High.'}
    >>> whole_answer({"finish_reason": "length", "message": {"role": "assistant", "content": "Hi"}})
    """
    if choice["finish_reason"] == "length":
        return None
    said = {key: value for key, value in choice["message"].items() if key in KEPT and value}
    try:
        [made] = plain([message(said, "the answer")])
    except Problem:
        return None
    return made


# the store


def keep(store: Store, run: str, found: dict[int, Answer]) -> None:
    """Write answers, by the number of their prompt, as one more object of the run."""
    lines = "".join(json.dumps({"at": at, "answer": said}) + "\n" for at, said in found.items())
    store.put_own(f"runs/{run}/answers/{min(found):08d}.jsonl", lines.encode())


def kept(store: Store, run: str) -> dict[int, Answer]:
    """The answers that a run has."""
    names = store.children(f"runs/{run}/answers")
    lines = [line for name in names for line in (store.get(f"runs/{run}/answers/{name}") or b"").splitlines()]
    return {one["at"]: one["answer"] for one in map(json.loads, lines)}
