"""A real server on loopback, asked by OpenAI's own client, and by sockets where that client is too polite."""

from __future__ import annotations

import http.client
import json
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch

from fbitrain.inference import generate
from fbitrain.inference.generate import Sampling, prompt_tokens, stream_text
from fbitrain.kernels import cpu
from fbitrain.loading.model_folder import Pretrained
from fbitrain.serving import app as serving_app
from fbitrain.serving import worker as serving_worker
from tests.serving.conftest import CONTEXT, Served

pytestmark = pytest.mark.skipif(bool(cpu.levels()["portable"]), reason="the compiled kernels do not run here")
Serve = Callable[..., Served]
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


@pytest.fixture
def served(serve: Serve) -> Served:
    return serve()


def post(served: Served, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, Any, Any]:
    """Status, headers and JSON of the answer."""
    where = urlsplit(served.url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=30)
    connection.request("POST", path, body, {"Content-Type": "application/json", **(headers or {})})
    answer = connection.getresponse()
    found = answer.status, answer.headers, json.loads(answer.read())
    connection.close()
    return found


def test_a_completion_is_what_generate_gives(served: Served, model: Pretrained) -> None:
    client = served.client()
    sampling = Sampling(max_new_tokens=20)
    expected = "".join(stream_text(model.lm, model.tokenizer, model.prompt_start, "the model", sampling))
    answer = client.completions.create(prompt="the model", max_tokens=20, **GREEDY)
    assert answer.choices[0].text == expected != ""
    assert answer.choices[0].finish_reason == "length"
    n_prompt = len(prompt_tokens(model.lm, model.tokenizer, model.prompt_start, "the model"))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 20)
    ids = prompt_tokens(model.lm, model.tokenizer, model.prompt_start, "the model")
    for prompt in (ids, [ids, ids], ["the model", "the model"]):
        again = client.completions.create(prompt=prompt, max_tokens=20, **GREEDY)
        assert [choice.text for choice in again.choices] == [expected] * (1 if prompt is ids else 2)
    assert [card.id for card in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "fbitrain"


def test_a_stream_adds_up_to_the_whole(served: Served) -> None:
    client = served.client()
    how = {
        "model": "tiny",
        "prompt": ["the", "a"],
        "n": 2,
        "max_tokens": 30,
        "temperature": 1.5,
        "top_p": 0.9,
        "seed": 7,
    }
    whole = client.completions.create(**how)
    chunks = list(client.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    texts, finishes = [""] * 4, [None] * 4
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert chunk.usage is None
        texts[choice.index] += choice.text
        finishes[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4, "each choice has a seed of its own"
    assert finishes == ["length"] * 4
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert client.completions.create(**{**how, "seed": 8}).choices[0].text != texts[0]


def test_a_chat_follows_the_template(served: Served, model: Pretrained) -> None:
    client = served.client()
    messages: list[Any] = [
        {"role": "system", "content": "one bit"},
        {"role": "user", "content": [{"type": "text", "text": "the model </s>"}]},
    ]
    answer = client.chat.completions.create(messages=messages, max_tokens=12, **GREEDY)
    name = model.tokenizer.encode("</s>")  # written by a user it is text
    plain = [model.tokenizer.encode(text) for text in ("system:one bit", "user:the model ", "assistant:")]
    ids = [0, *plain[0], 1, *plain[1], *name, 1, *plain[2]]
    expected = "".join(generate.stream_pieces(model.lm, model.tokenizer, ids, Sampling(max_new_tokens=12)))
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    chunks = list(client.chat.completions.create(messages=messages, max_completion_tokens=12, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    filled = client.chat.completions.create(messages=messages, **GREEDY)
    assert filled.usage is not None
    assert filled.usage.total_tokens == CONTEXT
    with pytest.raises(openai.BadRequestError, match="refuses the conversation: no developers here"):
        client.chat.completions.create(messages=[{"role": "developer", "content": "x"}], **GREEDY)


def test_without_a_template_a_chat_is_refused(serve: Serve) -> None:
    with pytest.raises(openai.BadRequestError, match="has none") as error:
        serve(chat="the tokenizer has none").client().chat.completions.create(
            messages=[{"role": "user", "content": "x"}], **GREEDY
        )
    assert error.value.code == "no_chat_template"


def scripted(monkeypatch: pytest.MonkeyPatch, ids: list[int], wait: Callable[[], object] = lambda: None) -> list[str]:
    """Lets the worker's model say `ids`, after `wait()` for each; returns what came of it, to be filled."""
    ends: list[str] = []

    def say(lm: object, prompt: object, sampling: Sampling, wanted: Callable[[], bool]) -> Any:
        for n, token in enumerate(ids[: sampling.max_new_tokens]):
            if not wanted():
                ends.append(f"unwanted after {n}")
                return
            yield generate.Token(token, -1.0)
            wait()
        ends.append("said")

    monkeypatch.setattr(serving_worker, "generate_tokens", say)
    return ends


def test_stop_strings_and_characters_of_several_tokens(
    served: Served, model: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " é漢 the model👩‍🔬 learns"
    scripted(monkeypatch, model.tokenizer.encode(text))
    ask: dict[str, Any] = {**GREEDY, "prompt": "x", "max_tokens": 400}
    client = served.client()
    for stop, expected in (
        (None, text),
        ("odel", " é漢 the m"),
        (["never there", "👩", "the"], " é漢 "),
        (["learns more"], text),  # only its beginning stands there
        ([" é漢 the model👩‍🔬 learns"], ""),
    ):
        whole = client.completions.create(**ask, stop=stop)
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**ask, stop=stop, stream=True)]
        assert whole.choices[0].text == "".join(pieces) == expected
        assert whole.choices[0].finish_reason == "stop"
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_logprobs_are_the_models(served: Served, model: Pretrained) -> None:
    client = served.client()
    ids = prompt_tokens(model.lm, model.tokenizer, model.prompt_start, "the model")
    drawn = list(generate.stream_tokens(model.lm, ids, Sampling(max_new_tokens=6)))
    hidden = model.lm.hidden(torch.tensor([ids + drawn]))[0]
    logprobs = model.lm.head(hidden).log_softmax(1)[len(ids) - 1 : -1]
    expected = logprobs[range(6), drawn].tolist()
    found = client.completions.create(prompt="the model", max_tokens=6, logprobs=2, **GREEDY).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert found.tokens is not None
    assert found.top_logprobs is not None
    assert [max(top, key=lambda name: top[name]) for top in found.top_logprobs] == found.tokens
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(6)]
    messages: list[Any] = [{"role": "user", "content": "the"}]
    ask: dict[str, Any] = {**GREEDY, "messages": messages, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**ask).choices[0].logprobs.content
    assert [token.logprob for token in content] == [token.top_logprobs[0].logprob for token in content]
    assert all(len(token.top_logprobs) == 3 for token in content)
    streamed = [c.choices[0].logprobs for c in client.chat.completions.create(**ask, stream=True)]
    assert [token for one in streamed if one for token in one.content] == content


@pytest.mark.parametrize(
    ("body", "message", "field"),
    [
        ({"prompt": "x", "max_tokens": CONTEXT}, "the model's context is 512; shorten the prompt", "max_tokens"),
        ({"prompt": [1] * CONTEXT}, "512 tokens and fills the model's 512 positions", "prompt"),
        ({"prompt": [3, 301]}, "token id 301 is not in the vocabulary of 301", "prompt"),
        ({"prompt": [[3], [-1]]}, "token id -1 is not in the vocabulary", "prompt"),
        ({"prompt": [True]}, "prompt must be a text, a list of texts", "prompt"),
        ({"prompt": {}}, "prompt must be a text", "prompt"),
        ({"prompt": ["x"] * 33, "n": 2}, "more than 64", "n"),
        ({"n": 0}, "n must be a whole number of at least 1", "n"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number", "max_tokens"),
        ({"temperature": -1}, "temperature=-1.0 must be 0 or more", "temperature"),
        ({"temperature": math.nan}, "temperature=inf must be", "temperature"),
        ({"top_p": 0}, "top_p=0.0 must be above 0", "top_p"),
        ({"stop": ["a"] * 5}, "at most 4 texts", "stop"),
        ({"stop": [""]}, "1 to 256 characters", "stop"),
        ({"stop": 0}, "1 to 256 characters", "stop"),
        ({"logprobs": 6}, "logprobs must be a whole number from 0 to 5", "logprobs"),
        ({"echo": True}, "echo is not supported; leave it out", "echo"),
        ({"best_of": 3}, "best_of is not supported", "best_of"),
        ({"logit_bias": {"3": 1}}, "logit_bias is not supported", "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "needs stream: true", "stream_options"),
        ({"stream": "yes"}, "stream must be true or false", "stream"),
        ({"temprature": 1}, "did you mean temperature?", "temprature"),
        ({"model": 3}, "model must be the name", "model"),
    ],
)
def test_a_wrong_request_is_one_sentence(served: Served, body: dict[str, Any], message: str, field: str) -> None:
    status, _, answer = post(served, "/v1/completions", json.dumps({"model": "tiny", **body}).encode())
    assert status == 400
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert (answer["error"]["type"], answer["error"]["param"]) == ("invalid_request_error", field)


def test_what_is_no_request_is_refused(serve: Serve) -> None:
    served = serve(max_body_bytes=1000)
    for body, status, message in (
        (b"{", 400, "not JSON"),
        (b"[" * 900, 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        (b"\xff", 400, "not JSON in UTF-8"),
        (b'{"model": "tiny", "prompt": "\\ud800", "stop": "\\ud800", "nn\\ud800": 1}', 400, "is no field"),
        (b" " * 1001, 413, "larger than 1000 bytes"),
        (b'{"model": "other"}', 404, "'other' is not served here, but 'tiny' is"),
    ):
        found, _, answer = post(served, "/v1/completions", body)
        assert (found, message in answer["error"]["message"]) == (status, True), answer
    chunked = iter([b" " * 600, b" " * 600])  # of a length that nobody declares
    assert post(served, "/v1/completions", chunked)[0] == 413
    assert post(served, "/v1/completions", b"{}", {"Content-Type": "text/plain"})[0] == 415
    assert post(served, "/v1/completions", b"{}", {"Host": "evil.example:80"})[0] == 403
    for host in ("localhost", "127.0.0.2:80", "[::1]:80"):
        assert post(served, "/v1/completions", b"{", {"Host": host})[0] == 400
    assert post(served, "/v1/nothing", b"{}")[0] == 404
    assert post(served, "/health", b"{}")[0] == 405
    ok = b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 2, "messages": null}'
    assert post(served, "/v1/completions", ok)[0] == 200


def test_a_body_that_does_not_come_is_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_app, "BODY_TIMEOUT_S", 0.05)
    where = urlsplit(served.url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=30)
    connection.putrequest("POST", "/v1/completions")
    for name, value in (("Content-Type", "application/json"), ("Content-Length", "10")):
        connection.putheader(name, value)
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408


def test_a_key_is_asked_for(serve: Serve) -> None:
    served = serve(api_key="geheim")
    assert served.client(api_key="geheim").models.list().data
    with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
        served.client().models.list()


def test_a_full_queue_says_when_to_ask_again(serve: Serve, model: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    served, go = serve(most_waiting=1), threading.Event()
    scripted(monkeypatch, model.tokenizer.encode("the model"), lambda: go.wait(30))
    found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def ask() -> None:
        answer = served.client().completions.create(prompt="x", **GREEDY)
        found.put(answer.choices[0].text)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for n, thread in enumerate(threads, 1):
        thread.start()
        served.wait_for(lambda n=n: served.worker.n_jobs == n)
    status, headers, answer = post(served, "/v1/completions", b'{"model": "tiny", "prompt": "x"}')
    assert (status, headers["retry-after"]) == (503, "1")
    assert answer["error"]["code"] == "queue_full"
    go.set()
    for thread in threads:
        thread.join(30)
    assert [found.get(timeout=5) for _ in threads] == ["the model"] * 2
    assert served.worker.n_jobs == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(
    served: Served, model: Pretrained, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    steps = threading.Semaphore(2)  # tokens that may be said
    ends = scripted(monkeypatch, model.tokenizer.encode("the model learns from a teacher"), steps.acquire)
    where = urlsplit(served.url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=30)
    body = json.dumps({**GREEDY, "prompt": "x", "max_tokens": 100, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    served.wait_for(lambda: served.worker.n_jobs == 1)
    if stream:
        connection.getresponse().readline()
    connection.close()
    served.wait_for(lambda: served.worker.n_jobs == 0)
    steps.release(100)
    served.wait_for(lambda: bool(ends))
    assert ends[0].startswith("unwanted after")


def test_an_error_in_the_middle_is_never_half_an_answer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        yield generate.Token(40)
        raise serving_worker.UserError("the model's logits are not finite")

    monkeypatch.setattr(serving_worker, "generate_tokens", broken)
    client = served.client()
    with pytest.raises(openai.InternalServerError, match="not finite"):
        client.completions.create(prompt="x", **GREEDY)
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(prompt="x", stream=True, **GREEDY))


@pytest.mark.parametrize("stream", [True, False])
def test_what_lasts_longer_than_the_grace_gets_an_error(
    serve: Serve, model: Pretrained, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    served = serve(grace_s=0.2)
    scripted(monkeypatch, model.tokenizer.encode("the model") * 100, lambda: time.sleep(0.05))
    stopper = threading.Timer(0.3, lambda: setattr(served.server, "should_exit", True))
    stopper.start()

    def ask() -> None:
        answer = served.client().completions.create(prompt="x", max_tokens=200, stream=stream, **GREEDY)
        list(answer if stream else [])

    with pytest.raises(openai.APIError, match="the server is stopping"):
        ask()
    stopper.join()
