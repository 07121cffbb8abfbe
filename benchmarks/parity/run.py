"""The recorded requests to bare vLLM and to Springtide, one at a time, so that both engines have each request alone in a batch."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from benchmarks import peers
from benchmarks.parity import report
from benchmarks.parity.answers import Answer, differences, read
from benchmarks.parity.report import Compared
from benchmarks.parity.request import Request
from benchmarks.parity.requests import recorded
from benchmarks.place import changes, console, finish, machine, springtide
from benchmarks.real import CHAT, PORT, real_models
from cluster.config import Config

TIMEOUT_S = 120

Ask = Callable[[Request], Answer]


def parity(options: argparse.Namespace) -> None:
    """Send the same recorded requests to bare vLLM and to Springtide, and list what differs."""
    requests = recorded()[:: options.every]
    console.print(f"{machine()}\n{len(requests)} requests, one at a time, to bare vLLM and then to Springtide.")
    with real_models() as (config, folders):
        with bare(config, folders) as ask:
            expected = _answers("bare vLLM", ask, requests)
        with springtide(config, changes()) as served:
            ours = _answers("Springtide", asking({"": served.url.removesuffix("/v1")}), requests)
    compared = [Compared(one, differences(*pair)) for one, pair in zip(requests, zip(expected, ours, strict=True), strict=True)]
    console.print(report.text(compared), markup=False, highlight=False)
    if options.markdown:
        options.markdown.write_text(report.text(compared))
    if options.json:
        answered = zip(requests, expected, ours, strict=True)
        rows = [{"name": one.name, "bare": a._asdict(), "ours": b._asdict()} for one, a, b in answered]
        options.json.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    finish(report.verdicts(compared))


def _answers(system: str, ask: Ask, requests: Sequence[Request]) -> list[Answer]:
    with console.status(system) as status:
        answers: list[Answer] = []
        for number, request in enumerate(requests, 1):
            status.update(f"{system}: {number} of {len(requests)}")
            answers.append(ask(request))
    return answers


def asking(urls: dict[str, str]) -> Ask:
    """``urls``: model → where it is served; the key "" is where everything else goes."""
    client = httpx.Client(timeout=TIMEOUT_S, trust_env=False)

    def ask(request: Request) -> Answer:
        model = request.body.get("model", "") if isinstance(request.body, dict) else ""
        url = urls.get(model, urls[""]) + request.path
        raw = request.body if isinstance(request.body, str) else json.dumps(request.body)
        content = None if request.body is None else raw.encode()
        try:
            response = client.request(request.method, url, content=content, headers={"content-type": "application/json"})
        except httpx.HTTPError as error:
            return Answer(0, repr(error), ended=False)
        return read(response.status_code, response.headers.get("content-type", ""), response.content)

    return ask


@contextmanager
def bare(config: Config, folders: dict[str, Path]) -> Iterator[Ask]:
    """vLLM's own server for each model, by the arguments that the fleets' engines have, and without what Springtide mends in vLLM."""
    with ExitStack() as servers:
        urls: dict[str, str] = {}
        for port, (fleet, folder) in enumerate(folders.items(), PORT):
            served = servers.enter_context(peers.serving("bare_vllm", config, folder, port, fleet))
            urls[fleet] = served.url.removesuffix("/v1")
        yield asking({**urls, "": urls[CHAT]})
