"""Answers as OpenAI's API writes them: whole objects, and the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from fbitrain.data.reading.records import REPLACEMENT
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.inference.generate import Token
from fbitrain.serving.protocol import Request
from fbitrain.serving.worker import Step


class Answer:
    """The answer to one request; Steps are given to it in their order."""

    def __init__(self, request: Request, tokenizer: Tokenizer, n_prompt_tokens: int) -> None:
        self._request, self._tokenizer, self._n_prompt_tokens = request, tokenizer, n_prompt_tokens
        kind = "chat.completion" if request.is_chat else "text_completion"
        streamed = kind + ".chunk" if request.is_chat and request.stream else kind
        prefix = "chatcmpl" if request.is_chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": streamed,
            "created": int(time.time()),
            "model": request.model,
        }
        n_choices = request.n * max(1, len(request.prompts))
        self._steps: list[list[Step]] = [[] for _ in range(n_choices)]
        self._offsets = [0] * n_choices  # characters of the tokens so far

    # A stream

    def opening(self) -> Iterator[dict[str, Any]]:
        """What stands before the first text."""
        if self._request.is_chat:
            for number in range(len(self._steps)):
                yield self._chunk(number, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def chunk(self, step: Step) -> dict[str, Any] | None:
        """The chunk for a step, if it says anything."""
        asked = self._request.sampling.logprobs is not None
        tokens = [step.token] if step.token is not None and asked else []
        if not (step.text or tokens or step.finish):
            return None
        content = {"content": step.text} if step.text else {}
        what: dict[str, Any] = {"delta": content} if self._request.is_chat else {"text": step.text}
        return self._chunk(step.choice, what, self._logprobs(step.choice, tokens) if tokens else None, step.finish)

    def closing(self, n_tokens: int) -> Iterator[dict[str, Any]]:
        """What stands after the last text: the usage, if it is asked for."""
        if self._request.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage(n_tokens)}

    def _chunk(self, number: int, what: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": number, **what, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._request.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    # A whole answer

    def add(self, step: Step) -> None:
        self._steps[step.choice].append(step)

    def whole(self, n_tokens: int) -> dict[str, Any]:
        choices = [self._choice(number, steps) for number, steps in enumerate(self._steps)]
        return {**self._head, "choices": choices, "usage": self._usage(n_tokens)}

    def _choice(self, number: int, steps: list[Step]) -> dict[str, Any]:
        text = "".join(step.text for step in steps)
        asked = self._request.sampling.logprobs is not None
        tokens = [step.token for step in steps if step.token is not None]
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": number,
            **({"message": message} if self._request.is_chat else {"text": text}),
            "logprobs": self._logprobs(number, tokens) if asked else None,
            "finish_reason": steps[-1].finish,
        }

    # Both

    def _usage(self, n_tokens: int) -> dict[str, int]:
        n_prompt = self._n_prompt_tokens
        return {"prompt_tokens": n_prompt, "completion_tokens": n_tokens, "total_tokens": n_prompt + n_tokens}

    def _logprobs(self, number: int, tokens: list[Token]) -> dict[str, Any]:
        if self._request.is_chat:
            return {"content": [self._chat_logprobs(token) for token in tokens], "refusal": None}
        texts = [self._text(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(text)
        likeliest = [{self._text(i): logprob for i, logprob in token.likeliest} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": likeliest if self._request.sampling.logprobs else None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, token: Token) -> dict[str, Any]:
        likeliest = [self._named(i, logprob) for i, logprob in token.likeliest]
        return {**self._named(token.id, token.logprob), "top_logprobs": likeliest}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if REPLACEMENT in text else list(text.encode()),  # part of a character has no text
        }

    def _text(self, token_id: int) -> str:
        """A token's text within a text: SentencePiece leaves out the space before the first."""
        once, twice = (self._tokenizer.decode([token_id] * times) for times in (1, 2))
        return twice[len(once) :] or once
