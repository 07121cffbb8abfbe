"""A recorded request of `benchmarks.parity`."""

from typing import Any, NamedTuple

CHATS, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
RESPONSES, MESSAGES, TOKENIZE, RERANK, SCORE = "/v1/responses", "/v1/messages", "/tokenize", "/v1/rerank", "/score"


class Request(NamedTuple):
    name: str
    path: str
    body: Any
    """JSON; text is sent as it stands."""
    method: str = "POST"
    differs: str = ""
    """Why the answers are meant to differ."""

    @property
    def kind(self) -> str:
        """The row of the table that it counts in."""
        streamed = isinstance(self.body, dict) and self.body.get("stream") is True
        routes = {CHATS: "chat", COMPLETIONS: "completions", EMBEDDINGS: "embeddings"}
        return f"{routes.get(self.path, 'other routes')}{', streamed' if streamed else ''}"
