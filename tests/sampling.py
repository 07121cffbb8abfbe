"""A gateway whose engine is a small model in this process, at `/v1/completions` alone: real sampling from real weights, for unit tests."""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from cluster.client import Client
from cluster.endpoint import Endpoint
from cluster.errors import NoReplica, SpringtideError
from cluster.store.registry import Registry
from cluster.types import VersionId

END = 1
"""The token that ends an answer."""


class Fleet:
    """Holds what it is told to, as control has a fleet do, and answers by it."""

    def __init__(self, registry: Registry, cache: Path) -> None:
        self.registry, self.cache = registry, cache
        self.held: dict[str, Any] = {}
        """Version id → the model."""
        self.most = 0
        """The most versions that were held at a time."""
        self.asked: Counter[str] = Counter()
        """Version id → requests."""
        self.bodies: list[dict[str, Any]] = []
        self.failing: list[SpringtideError] = []
        """What the next requests get in place of an answer."""
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def client(self) -> Client:
        return Client(Endpoint(f"http://127.0.0.1:{self.server.server_port}", ""))

    # as control

    def hold_interims(self, run: str, versions: list[str], places: int) -> None:
        for id in versions:
            if id not in self.held:
                self.held[id] = self.loaded(VersionId.parse(id))
        self.held = dict(sorted(self.held.items(), key=lambda one: VersionId.parse(one[0]).n)[-places:])
        self.most = max(self.most, len(self.held))

    def end_interims(self, run: str) -> None:
        self.held = {}

    def loaded(self, id: VersionId) -> Any:
        manifest = self.registry.manifest(id)
        base = LlamaForCausalLM.from_pretrained(self.registry.fetch(self.registry.manifest(manifest.weights), self.cache))
        model: Any = PeftModel.from_pretrained(base, str(self.registry.fetch(manifest, self.cache)))
        return model.merge_and_unload().eval()

    # as a gateway

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            self.asked[body["model"]] += 1
            self.bodies.append(body)
            if self.failing:
                raise self.failing.pop(0)
            if body["model"] not in self.held:
                raise NoReplica("No replica holds it.")
            choices = [self.sampled(body, number) for number in range(body.get("n", 1))]
        return {"choices": choices}

    @torch.no_grad()
    def sampled(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        model, ids, told = self.held[body["model"]], list(body["prompt"]), list[float]()
        draws = torch.Generator().manual_seed(body.get("seed", 0) + number)
        while len(told) < body["max_tokens"]:
            logprobs = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(0)
            greedy = body["temperature"] == 0
            token = int(logprobs.argmax() if greedy else torch.multinomial(logprobs.exp(), 1, generator=draws))
            ids.append(token)
            told.append(float(logprobs[token]))
            if token == END:
                break
        made = ids[len(body["prompt"]) :]
        return {
            "text": " ".join(map(str, made)),
            "token_ids": made,
            "logprobs": {"token_logprobs": told},
            "finish_reason": "stop" if made[-1] == END else "length",
        }

    def handler(self) -> type[BaseHTTPRequestHandler]:
        fleet = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                try:
                    status, answer = 200, fleet.answer(body)
                except SpringtideError as error:
                    status, answer = error.status, error.body()
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None: ...

        return Handler
