"""The HTTP response that a job becomes: one JSON object, or a stream of server-sent events.

An error before the first event is an HTTP status; one after it is an event of its own, without the [DONE] that ends a
stream. So no client takes half an answer for a whole one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fbitrain.serving.answers import Answer
from fbitrain.serving.protocol import RequestError
from fbitrain.serving.worker import Event, Failed, Finished, Job


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, media_type="application/json")


def error_response(error: RequestError, headers: Mapping[str, str] | None = None) -> Response:
    return json_response(error.body(), error.status, headers)


class Generation(Response):
    """`events`: what the job delivers. When the client leaves, the job is cancelled; it ends at the next token."""

    def __init__(self, job: Job, events: asyncio.Queue[Event | None], answer: Answer, *, streams: bool) -> None:
        super().__init__()
        self._job, self._events, self._answer, self._streams = job, events, answer, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            first = await self._events.get()
            if isinstance(first, Failed):
                await _error_of(first)(scope, receive, send)
            elif first is not None and self._streams:
                await self._stream(first, send)
            elif first is not None and (response := await self._whole(first)):
                await response(scope, receive, send)
        finally:
            self._job.cancelled.set()
            watcher.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def _whole(self, event: Event | None) -> Response | None:
        """None if the client left."""
        while event is not None:
            if isinstance(event, Failed):
                return _error_of(event)
            if isinstance(event, Finished):
                return json_response(self._answer.whole(event.n_tokens))
            self._answer.add(event)
            event = await self._events.get()
        return None

    async def _stream(self, event: Event | None, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for chunk in self._answer.opening():
            await _send_event(send, json.dumps(chunk))
        while event is not None:
            if isinstance(event, Failed):
                await _send_event(send, json.dumps(RequestError(event.message, status=event.status).body()))
                break
            if isinstance(event, Finished):
                for chunk in self._answer.closing(event.n_tokens):
                    await _send_event(send, json.dumps(chunk))
                await _send_event(send, "[DONE]")
                break
            if chunk_of_step := self._answer.chunk(event):
                await _send_event(send, json.dumps(chunk_of_step))
            event = await self._events.get()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


def _error_of(failed: Failed) -> Response:
    headers = {"retry-after": "1"} if failed.status == 503 else None
    return error_response(RequestError(failed.message, status=failed.status), headers)
