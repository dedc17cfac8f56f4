"""What a request to /v1/completions or /v1/chat/completions asks for, read from its JSON and checked.

The fields are those of OpenAI's API (platform.openai.com/docs/api-reference), and top_k. A field that would change the
answer and is not supported is refused rather than left out.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fbitrain.base.errors import UserError
from fbitrain.inference.generate import Sampling

MOST_CHOICES = 64  # prompts times n
MOST_STOPS, MOST_STOP_CHARS = 4, 256
MOST_LOGPROBS, MOST_CHAT_LOGPROBS = 5, 20
DEFAULT_MAX_TOKENS = 16  # of a completion; an answer in a chat may fill the context
ROLES = ("system", "developer", "user", "assistant")

# Fields that change nothing here, and those that are taken with the value that changes nothing.
WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class RequestError(Exception):
    """What is wrong with a request, in one sentence, as OpenAI's API says it: HTTP status, type, field and code."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A checked request. Of `prompts` and `messages` one is there: messages make a chat."""

    model: str
    prompts: list[str | list[int]]
    messages: list[dict[str, str]]
    max_tokens: int | None  # None: as many as there is room for
    sampling: Sampling  # but for its max_new_tokens
    n: int
    stops: list[str]
    stream: bool
    include_usage: bool

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)


class _Fields:
    """The fields of a JSON object; null is as if a field were not there. What is never asked for is unknown."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where, self._asked = where, set[str]()

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        return self._values.get(name, default)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def whole(self, name: str, least: int, most: float = math.inf) -> int | None:
        value = self.get(name)
        if value is not None and not (
            isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        ):
            limits = f"from {least} to {most}" if most < math.inf else f"of at least {least}"
            raise self.wrong(name, f"a whole number {limits}")
        found: int | None = value
        return found

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        return float(value) if abs(value) <= 1e308 else math.inf

    def wrong(self, name: str, wanted: str) -> RequestError:
        return RequestError(f"{self._where}{name} must be {wanted}", param=self._where + name)

    def refuse_unknown(self) -> None:
        for name, neutral in NEUTRAL.items():
            value = self.get(name)
            if value is not None and value not in neutral:
                raise RequestError(f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")
        if unknown := sorted(set(self._values) - self._asked - WITHOUT_EFFECT):
            near = difflib.get_close_matches(unknown[0], self._asked, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise RequestError(f"{unknown[0]} is no field of this request; {hint}", param=unknown[0])


def read_json(body: bytes) -> Mapping[str, Any]:
    """The object that `body` holds. Raises RequestError."""
    try:
        values = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise RequestError('the body must be a JSON object, such as {"model": "NAME", "prompt": "Once"}')
    return values


def read_completion(values: Mapping[str, Any]) -> Request:
    """A request to /v1/completions. Raises RequestError."""
    fields = _Fields(values)
    prompts = _prompts(fields)
    n = fields.whole("n", 1) or 1
    if (fields.whole("best_of", 1) or n) != n:
        raise RequestError("best_of is not supported but as n; leave it out", param="best_of")
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    max_tokens = fields.whole("max_tokens", 1) or DEFAULT_MAX_TOKENS
    return _request(fields, n, logprobs, max_tokens, prompts=prompts)


def read_chat(values: Mapping[str, Any]) -> Request:
    """A request to /v1/chat/completions. Raises RequestError."""
    fields = _Fields(values)
    messages = _messages(fields)
    likeliest = fields.whole("top_logprobs", 0, MOST_CHAT_LOGPROBS)
    logprobs = (likeliest or 0) if fields.flag("logprobs") else None
    if likeliest is not None and logprobs is None:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    old, new = fields.whole("max_tokens", 1), fields.whole("max_completion_tokens", 1)
    return _request(fields, fields.whole("n", 1) or 1, logprobs, new or old, messages=messages)


def _request(
    fields: _Fields,
    n: int,
    logprobs: int | None,
    max_tokens: int | None,
    *,
    prompts: list[str | list[int]] | None = None,
    messages: list[dict[str, str]] | None = None,
) -> Request:
    if max(1, len(prompts or [])) * n > MOST_CHOICES:
        raise RequestError(f"prompts times n are more than {MOST_CHOICES}; send several requests", param="n")
    model = fields.get("model", "")
    if not isinstance(model, str) or not model:
        raise fields.wrong("model", "the name of a model, as /v1/models tells it")
    sampling = _sampling(fields, logprobs)
    stops, stream, options = _stops(fields), fields.flag("stream"), fields.get("stream_options")
    if options is not None and not (stream and isinstance(options, dict)):
        raise RequestError("stream_options must be an object, and needs stream: true", param="stream_options")
    nested = _Fields(options or {}, "stream_options.")
    include_usage = nested.flag("include_usage")
    nested.flag("include_obfuscation")  # the padding that it switches is never there
    nested.refuse_unknown()
    fields.refuse_unknown()
    return Request(model, prompts or [], messages or [], max_tokens, sampling, n, stops, stream, include_usage)


def _sampling(fields: _Fields, logprobs: int | None) -> Sampling:
    seed = fields.whole("seed", -(2**63), 2**64 - 1)
    try:
        return Sampling(
            temperature=fields.number("temperature", 1.0),
            top_k=fields.whole("top_k", 0) or 0,
            top_p=fields.number("top_p", 1.0),
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
            logprobs=logprobs,
        )
    except UserError as error:
        raise RequestError(str(error), param=str(error).split("=")[0]) from None


def _prompts(fields: _Fields) -> list[str | list[int]]:
    """The prompts as a list: text, or token ids, whose range is checked where the vocabulary is known."""
    value = fields.get("prompt", "")
    if isinstance(value, str):
        return [value]
    if _is_list_of(int, value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str) or _is_list_of(int, one) for one in value):
        return value
    raise fields.wrong("prompt", "a text, a list of texts, a list of token ids, or a list of such lists")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is kind for one in value)


def _messages(fields: _Fields) -> list[dict[str, str]]:
    values = fields.get("messages")
    if not isinstance(values, list) or not values:
        raise fields.wrong("messages", 'a list such as [{"role": "user", "content": "Hello"}]')
    messages = []
    for number, value in enumerate(values):
        where = f"messages[{number}]"
        if not isinstance(value, dict):
            raise RequestError(f"{where} must be an object with role and content", param=where)
        if value.get("role") not in ROLES:
            raise RequestError(f"{where}.role must be {', '.join(ROLES[:-1])} or {ROLES[-1]}", param=where)
        messages.append({"role": value["role"], "content": _content(value.get("content"), where)})
    return messages


def _content(value: Any, where: str) -> str:
    """A message's text, which may come in parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        texts = [part.get("text") for part in value]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise RequestError(f"{where}.content must be text, or a list of parts of type text", param=f"{where}.content")


def _stops(fields: _Fields) -> list[str]:
    value = fields.get("stop", [])
    stops = [value] if isinstance(value, str) else value
    if stops == []:
        return []
    if not (_is_list_of(str, stops) and all(1 <= len(stop) <= MOST_STOP_CHARS for stop in stops)):
        raise fields.wrong("stop", f"a text of 1 to {MOST_STOP_CHARS} characters, or a list of such texts")
    if len(stops) > MOST_STOPS:
        raise fields.wrong("stop", f"at most {MOST_STOPS} texts")
    return list(stops)
