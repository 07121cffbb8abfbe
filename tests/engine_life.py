"""One engine's whole life in this process, with real vLLM and without Ray's pool: ``python -m tests.engine_life FOLDER VERB``.

Prints one JSON document for each step. `tests.cluster.test_engine` reads them.
"""

import asyncio
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

from cluster.config import Config, Fleet, FleetSpec
from cluster.errors import ModelNotFound
from cluster.store.objects import Store
from cluster.store.registry import Registry
from cluster.types import Lineage, VersionId
from deployments import wire
from deployments.replica import ending
from deployments.replica import engine as module
from deployments.replica.engine import Engine
from deployments.replica.lifecycle import Owner
from tests.adapters import make_adapter, make_weights, spoil

ME = os.getpid()
PROMPT = "What is the colour of the sky? "
OPTIONS = {
    "enable_prefix_caching": False,
    "max_logprobs": 7,
    "chat_template": "{{ messages[0].content }}",
    "tool_call_parser": "hermes",
    "reasoning_parser": "deepseek_v3",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
    "enable_prompt_tokens_details": True,
}
"""The fleet's ``engine:`` section."""
TOOL = {
    "type": "function",
    "function": {"name": "sky", "parameters": {"type": "object", "properties": {"blue": {"type": "boolean"}}}},
}


def spec_in(root: Path) -> FleetSpec:
    fleet = Fleet(dtype="float32", kv_cache_bytes=128 << 20, enforce_eager=True, engine=OPTIONS)
    return Config(store=(root / "store").as_uri(), home=root / "home").spec_of("test", fleet)


def say(step: str, **facts: Any) -> None:
    print(json.dumps({"step": step, **facts}), flush=True)


def make_seedling(folder: Path) -> Path:
    """The seedling before it learnt anything."""
    from jobs.data import chat
    from jobs.training.seedling import FACTS, seedling, seedling_tokenizer

    torch.manual_seed(0)
    tokenizer = seedling_tokenizer(chat.read(str(FACTS)).examples)
    seedling(tokenizer, hidden_size=128, layers=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fill(root: Path, spec: FleetSpec) -> None:
    """seedling@1 and @2, a damaged @3, and tuned@1 on seedling@1, which was live."""
    registry = Registry(Store(spec.store))
    base = make_seedling(root / "base")
    first = registry.register("seedling", "weights", None, base, Lineage())
    registry.register("seedling", "weights", None, make_weights(root / "other", base, 7, 0.1), Lineage())
    registry.register("seedling", "weights", None, base, Lineage())
    spoil(root / "store" / "versions" / "seedling" / "3" / "files")
    registry.register("tuned", "adapter", first.id, make_adapter(root / "adapter", base), Lineage())
    registry.move("tuned", VersionId("tuned", 1), "test", "test", 0)


class Reads:
    """Counts what this process asks of the store, and in which thread."""

    def __init__(self) -> None:
        self.total = self.in_the_loop = 0
        for name, member in list(vars(Store).items()):
            if inspect.isfunction(member) and not name.startswith("_"):
                setattr(Store, name, self.counted(member))

    def counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **more: Any) -> Any:
            self.total += 1
            self.in_the_loop += threading.current_thread() is threading.main_thread()
            return read(*arguments, **more)

        return count


class Front:
    """The engine's own port, as a gateway sees it."""

    def __init__(self, url: str, secret: str) -> None:
        self.client = httpx.AsyncClient(base_url=url, timeout=60)
        self.secret = secret

    async def ask(self, model: str, n: int = 1, secret: str | None = None, **of: Any) -> httpx.Response:
        headers = wire.request_headers(self.secret if secret is None else secret, model, os.urandom(8).hex())
        body = {"model": model, "prompt": PROMPT * n, "max_tokens": 2, "temperature": 0, **of}
        return await self.client.post("/v1/completions", json=body, headers=headers)

    async def chat(self, model: str, **of: Any) -> httpx.Response:
        headers = wire.request_headers(self.secret, model, os.urandom(8).hex())
        body = {"model": model, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 100, "temperature": 0, **of}
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    async def scores(self, model: str, n: int) -> list[float]:
        """The log-probability of every token of the prompt but the first."""
        answer = (await self.ask(model, n, prompt_logprobs=0)).raise_for_status().json()
        return [round(next(iter(token.values()))["logprob"], 3) for token in answer["choices"][0]["prompt_logprobs"][1:]]


async def live(root: Path) -> None:
    spec = spec_in(root)
    fill(root, spec)
    reads, told = Reads(), list[tuple[str, ...]]()
    ending.tell = lambda *words: told.append(words)
    engine = Engine(spec, {})
    try:
        await engine.acquire(Owner("a", "app", ME), "seedling@9", spec)
    except ModelNotFound as error:
        say("no such version", error=type(error).__name__, state=engine.life.state.name, owner=engine.life.owner)
    first, second = await asyncio.gather(
        engine.acquire(Owner("a", "app", ME), "seedling@1", spec), engine.acquire(Owner("b", "app", ME), "seedling@1", spec)
    )
    state = await engine.describe()
    say("serves", owned=[first, second], owner=state.id, base=state.base, held=sorted(state.held))
    front, original = Front(state.url, state.secret), state.fingerprint
    await options(engine, front)
    before = reads.total
    await score(front)
    for_requests = reads.total - before
    await change_owner(engine, spec, front)
    await swap(engine, original)
    say("store", total=reads.total, in_the_loop=reads.in_the_loop, for_requests=for_requests)
    await die(engine, front, told)


async def options(engine: Engine, front: Front) -> None:
    """What vLLM has of the ``engine:`` section, and what clients see of it."""
    config = engine.hosting.vllm.engine.vllm_config
    plain, chat = await front.ask("seedling@1"), await front.chat("seedling@1", max_tokens=2)
    forced = await front.chat("seedling@1", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "sky"}})
    say(
        "options",
        prefix_caching=config.cache_config.enable_prefix_caching,
        policy=config.scheduler_config.policy,
        backend=config.structured_outputs_config.backend,
        reasoning=config.structured_outputs_config.reasoning_parser,
        draft=config.speculative_config and config.speculative_config.method,
        template=chat.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"],
        logprobs=[(await front.ask("seedling@1", logprobs=n)).status_code for n in (7, 8)],
        tools=(await front.chat("seedling@1", tools=[TOOL], max_tokens=2)).status_code,
        forced=forced.status_code,
        called=[call["function"]["name"] for call in forced.json()["choices"][0]["message"]["tool_calls"]],
    )


async def score(front: Front) -> None:
    """Prompts are scored alone, and then 24 at once by two models."""
    which = [(model, n) for model in ("seedling@1", "tuned@1") for n in (1, 2, 5)]
    alone = {one: await front.scores(*one) for one in which}
    together = await asyncio.gather(*(front.scores(*one) for one in which * 4))
    echo = await front.ask("tuned@1", echo=True, logprobs=1)
    say(
        "scores",
        alike=all(scores == alone[one] for one, scores in zip(which * 4, together, strict=True)),
        differ=alone["seedling@1", 1] != alone["tuned@1", 1],
        echo=echo.status_code,
        stranger=(await front.ask("seedling@1", secret="no")).status_code,
    )


async def change_owner(engine: Engine, spec: FleetSpec, front: Front) -> None:
    await engine.release(True)
    closed = await front.ask("seedling@1")
    say("sleeps", asleep=await engine.asleep(), status=closed.status_code, body=closed.text, owner=engine.life.owner)
    began_s = time.monotonic()
    owned = await engine.acquire(Owner("c", "app", ME), "seedling@2", spec)
    state = await engine.describe()
    say("wakes", owned=owned, base=state.base, held=sorted(state.held), took_s=round(time.monotonic() - began_s, 2))


async def swap(engine: Engine, original: str) -> None:
    damaged = await engine.swap_weights("seedling@3", "", False)
    say("damaged", base=damaged.base, refused=damaged.refused, state=engine.life.state.name)
    wrong = await engine.swap_weights("seedling@1", "another checksum", False)
    say("mismatch", base=wrong.base, refused=wrong.refused["seedling@1"], state=engine.life.state.name)
    back = await engine.swap_weights("seedling@1", original, False)
    say("back", base=back.base, held=sorted(back.held), same=back.fingerprint == original, refused=sorted(back.refused))


async def die(engine: Engine, front: Front, told: list[tuple[str, ...]]) -> None:
    """vLLM's engine process is killed while a long answer is under way."""
    # Eight, because a quick machine makes one in a second.
    long = asyncio.create_task(front.ask("seedling@1", max_tokens=900, ignore_eos=True, n=8))
    await asyncio.sleep(0.5)
    for process in psutil.Process().children(recursive=True):
        if "EngineCore" in " ".join(process.cmdline()) or "spawn_main" in " ".join(process.cmdline()):
            process.kill()
    began_s = time.monotonic()
    answer = await long
    while not told and time.monotonic() - began_s < 10:
        await asyncio.sleep(0.05)
    took_s = time.monotonic() - began_s
    after = await front.ask("seedling@1")
    say(
        "dies",
        status=answer.status_code,
        words=answer.text,
        told=told,
        took_s=round(took_s, 2),
        after=after.status_code,
        body=after.text,
        state=engine.life.state.name,
    )
    await asyncio.sleep(30)
    say("still here")


async def wait_for_nobody(root: Path) -> None:
    module.UNOWNED_S = 0.5
    engine = Engine(spec_in(root), {})
    say("born", state=engine.life.state.name)
    await asyncio.sleep(20)
    say("still here")


if __name__ == "__main__":
    verb = {"live": live, "alone": wait_for_nobody}[sys.argv[2]]
    asyncio.run(verb(Path(sys.argv[1])))
