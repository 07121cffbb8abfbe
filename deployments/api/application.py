"""The gateway's ASGI application: the table of routes, and one mapping of errors.

Bare ASGI: layers of middleware would cost every token, and these few lines are all it needs.
"""

import contextlib
from typing import Any

from cluster.config import Config
from cluster.errors import ResponseNotFound, SpringtideError
from cluster.types import ColdStage
from deployments.api import models
from deployments.api.admin import Admin
from deployments.api.cors import allowed_origin, answer_preflight, is_preflight, shown_to, varying
from deployments.api.inference import Inference, Routing
from deployments.http import Receive, Scope, Send, ignores_leaving, send_error, send_json, until_left
from deployments.routes import ANY, Route, Routes, plain_path
from deployments.routing.engine_routes import ENGINE_ROUTES
from deployments.routing.forms import OPENAI, Form
from deployments.routing.table import Table
from deployments.uvicorn_patches import ended_when_left, has_connection

MODELS = "/v1/models"


class Application:
    def __init__(self, config: Config, routing: Routing) -> None:
        self.routing = routing
        self.cors_origins = config.gateway.cors_origins
        self.routes = Routes(
            *(Route("POST", path, Inference(row, config.gateway, routing)) for path, row in ENGINE_ROUTES.items()),
            Route(ANY, "/v1/responses/*", refuse_kept_response),
            Route("GET", MODELS, self._models),
            Route("GET", f"{MODELS}/*", self._model),
            Route("GET", "/health", self._health),
            Route(ANY, "/admin/*", Admin(lambda: routing.refresh.control, config)),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._lifespan(receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        form = error_form(scope["path"])
        if origin := allowed_origin(scope, self.cors_origins):
            if is_preflight(scope):
                return await answer_preflight(scope, send, origin)
            send = shown_to(origin, send)
        elif self.cors_origins:
            send = varying(send)
        try:
            if ignores_leaving(scope) and not has_connection(scope):
                return await until_left(self.routes, scope, receive, send)
            with ended_when_left(scope):
                await self.routes(scope, receive, send)
        except SpringtideError as error:
            await send_error(send, error, form=form.body)
        except Exception:
            # A bug. The client gets it as an error where nothing has been sent yet; the server then logs it and closes.
            with contextlib.suppress(Exception):
                error = SpringtideError("Something went wrong here.", "Send the request again; the log has the reason.")
                await send_error(send, error, form=form.body)
            raise

    @property
    def table(self) -> Table:
        return self.routing.router.table

    async def _models(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, models.model_list(self.table))

    async def _model(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, models.model(self.table, scope["path"].removeprefix(f"{MODELS}/")))

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 where a request is answered, now or after a fleet was woken: a balancer must not keep the request away that would wake it."""
        if replicas := self.table.answering:
            return await send_json(send, 200, {"status": "ok", "replicas": replicas})
        stage, words = await self.routing.refresh.stage("")
        asleep = stage is ColdStage.ASLEEP
        document: dict[str, Any] = {"status": "asleep" if asleep else "starting", "replicas": 0, "stage": words}
        await send_json(send, 200 if asleep else 503, document)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                self.routing.refresh.stop()
                return self.routing.upstream.close()


def error_form(path: str) -> Form:
    """The form of the route's errors; OpenAI's where there is no such route."""
    row = ENGINE_ROUTES.get(plain_path(path))
    return row.form if row else OPENAI


async def refuse_kept_response(scope: Scope, receive: Receive, send: Send) -> None:
    """To read, cancel or delete an answer of ``/v1/responses`` later: it would have to be kept, and only its own replica could."""
    raise ResponseNotFound("No answer is kept here once it is sent.", "Ask again, with every earlier item in `input`.")
