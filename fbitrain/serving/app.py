"""The application behind `fbitrain serve`: OpenAI's /v1/models, /v1/completions and /v1/chat/completions, and /health.

A request is read, checked and made token ids; then it waits for the worker as a job (`generation.py` answers it).
"""

from __future__ import annotations

import asyncio
import hmac
import math
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from fbitrain.base.errors import UserError
from fbitrain.inference.generate import Sampling, prompt_tokens, room_after
from fbitrain.loading.chat_template import ChatTemplate
from fbitrain.serving.answers import Answer
from fbitrain.serving.generation import Generation, error_response, json_response
from fbitrain.serving.protocol import Request, RequestError, read_chat, read_completion, read_json
from fbitrain.serving.worker import Event, Job, Worker

if TYPE_CHECKING:
    from fbitrain.loading.model_folder import Pretrained

RETRY_AFTER = {"retry-after": "1"}  # seconds
CLOSE = {"connection": "close"}  # the rest of a body is not waited for
BODY_TIMEOUT_S = 30.0
MOST_NEW_TOKENS = 2048  # of an answer without max_tokens, by a model whose texts have no longest length
HOST = re.compile(r"(?:\[(?P<ipv6>[^]]*)\]|(?P<name>[^:]*))(?::\d+)?")
JSON = "application/json"


@dataclass(frozen=True)
class Serving:
    """What is served, and how. `chat`: the model's template, or the sentence that says why there is none."""

    model: Pretrained
    name: str
    worker: Worker
    chat: ChatTemplate | str
    max_body_bytes: int
    api_key: str = ""  # "": none is asked for
    loopback_only: bool = True  # refuse what a page in a browser sends to a name of its own that leads here


def make_app(serving: Serving) -> Starlette:
    """The ASGI application."""
    endpoints = _Endpoints(serving)
    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/chat/completions", endpoints.chat_completions, methods=["POST"]),
        ],
        exception_handlers={RequestError: _refused, HTTPException: _not_served, Exception: _failed},
    )


class _Endpoints:
    def __init__(self, serving: Serving) -> None:
        self._serving, self._model, self._worker = serving, serving.model, serving.worker
        self._started = int(time.time())
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="requests")  # tokenizes beside the event loop

    async def health(self, http: HttpRequest) -> Response:
        return json_response({"status": "ok", "requests": self._worker.n_jobs})

    async def models(self, http: HttpRequest) -> Response:
        self._admit(http)
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, http: HttpRequest) -> Response:
        self._admit(http)
        self._require_name(http.path_params["name"])
        return json_response(self._card())

    async def completions(self, http: HttpRequest) -> Response:
        return await self._generation(http, is_chat=False)

    async def chat_completions(self, http: HttpRequest) -> Response:
        return await self._generation(http, is_chat=True)

    async def _generation(self, http: HttpRequest, *, is_chat: bool) -> Response:
        self._admit(http)
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            # A page in a browser can send other types to any server without asking.
            raise RequestError(f"the request's Content-Type must be {JSON}", status=415)
        if self._worker.is_full:
            raise _busy()
        try:
            body = await asyncio.wait_for(self._body(http), BODY_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise RequestError(f"the body did not come within {BODY_TIMEOUT_S:.0f} s", status=408) from None
        except ClientDisconnect:
            return Response()  # for no one
        loop = asyncio.get_running_loop()
        request, prompts = await loop.run_in_executor(self._reader, self._read, body, is_chat)
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(prompts, request.n, request.stops, deliver)
        answer = Answer(request, self._model.tokenizer, sum(len(ids) for ids, _ in prompts))
        if not self._worker.submit(job):
            raise _busy()
        return Generation(job, events, answer, streams=request.stream)

    def _admit(self, http: HttpRequest) -> None:
        """Raises RequestError for who may not ask."""
        if self._serving.loopback_only and not _is_this_machine(http.headers.get("host", "")):
            raise RequestError("this server answers to localhost only, and the Host header names another", status=403)
        given = http.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if self._serving.api_key and not hmac.compare_digest(given, self._serving.api_key.encode()):
            raise RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")

    async def _body(self, http: HttpRequest) -> bytes:
        most = self._serving.max_body_bytes
        too_large = RequestError(f"the body is larger than {most} bytes; send less", status=413)
        declared = http.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        body = bytearray()
        async for chunk in http.stream():
            body += chunk
            if len(body) > most:
                raise too_large
        return bytes(body)

    def _read(self, body: bytes, is_chat: bool) -> tuple[Request, list[tuple[list[int], Sampling]]]:
        """The request, and what the model is given for each of its prompts. Raises RequestError."""
        values: Mapping[str, Any] = read_json(body)
        request = read_chat(values) if is_chat else read_completion(values)
        self._require_name(request.model)
        try:
            all_ids = self._prompt_ids(request)
            return request, [(ids, self._sampling(request, ids)) for ids in all_ids]
        except UserError as error:
            too_long = "context_length_exceeded" if "fills the model's" in str(error) else None
            raise RequestError(str(error), param="messages" if is_chat else "prompt", code=too_long) from None

    def _prompt_ids(self, request: Request) -> list[list[int]]:
        if request.is_chat:
            if isinstance(self._serving.chat, str):
                raise RequestError(self._serving.chat, code="no_chat_template")
            ids = self._serving.chat.encode(request.messages)
            self._require_known(ids)
            return [ids]
        found = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                found.append(prompt_tokens(self._model.lm, self._model.tokenizer, self._model.prompt_start, prompt))
            else:
                self._require_known(prompt)
                found.append(prompt)
        return found

    def _require_known(self, ids: list[int]) -> None:
        size = self._model.lm.config.vocab_size
        if wrong := [token_id for token_id in ids if not 0 <= token_id < size]:
            raise RequestError(f"token id {wrong[0]} is not in the vocabulary of {size}", param="prompt")

    def _sampling(self, request: Request, ids: list[int]) -> Sampling:
        room = room_after(self._model.lm, ids)
        wanted = request.max_tokens or int(min(room, MOST_NEW_TOKENS if room == math.inf else room))
        if wanted > room:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and max_tokens is {wanted}, but the model's context is "
                f"{len(ids) + room}; shorten the prompt or ask for fewer tokens",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return replace(request.sampling, max_new_tokens=wanted)

    def _require_name(self, name: str) -> None:
        if name != self._serving.name:
            message = f"the model {name!r} is not served here, but {self._serving.name!r} is"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    def _card(self) -> dict[str, Any]:
        return {"id": self._serving.name, "object": "model", "created": self._started, "owned_by": "fbitrain"}


def _is_this_machine(host: str) -> bool:
    """Whether a Host header names this machine from within: localhost, or an address of the loopback range."""
    found = HOST.fullmatch(host.lower())
    name = (found["ipv6"] or found["name"] or "") if found else ""
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _busy() -> RequestError:
    return RequestError("the server is busy and its queue is full; ask again later", status=503, code="queue_full")


async def _refused(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {401: {"www-authenticate": "Bearer"}, 408: CLOSE, 413: CLOSE, 503: RETRY_AFTER}
    return error_response(error, headers.get(error.status))


async def _not_served(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path} is not served here"
    return error_response(RequestError(message, status=error.status_code), error.headers)


async def _failed(http: HttpRequest, error: Exception) -> Response:
    return error_response(RequestError("the server failed; its log says why", status=500))
