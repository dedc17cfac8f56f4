"""A packed model of random weights with a tokenizer and a chat template, and a real server of it on loopback."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from fbitrain.benches.decoding import write_random_packed
from fbitrain.loading.chat_template import load_chat_template
from fbitrain.loading.model_folder import Pretrained, open_model
from fbitrain.model.config import BinarizeConfig, ModelConfig
from fbitrain.serving.app import Serving, make_app
from fbitrain.serving.server import Server, listen, url_of
from fbitrain.serving.worker import Worker

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "{{ message['role'] + ':' + message['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CONTEXT = 512


@pytest.fixture(scope="session")
def packed(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "packed"
    vocab_size = json.loads((workspace.teacher / "config.json").read_text())["vocab_size"]
    sizes = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 64, "d_ff": 160}
    shape = ModelConfig(vocab_size=vocab_size, max_seq_len=CONTEXT, **sizes)
    write_random_packed(folder, shape, BinarizeConfig())
    for file in workspace.teacher.glob("*token*"):
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 0}'
    )  # without an end every text is as long as asked
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def model(packed: Path) -> Iterator[Pretrained]:
    with open_model(packed) as opened:
        yield opened


@dataclass
class Served:
    """A server in a thread of its own."""

    url: str
    worker: Worker
    server: Server
    thread: threading.Thread

    def client(self, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 60, **settings}
        )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "it did not come about in 30 s"
            time.sleep(0.005)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.worker.close()
        assert not self.thread.is_alive()


@pytest.fixture
def serve(model: Pretrained) -> Iterator[Callable[..., Served]]:
    with ExitStack() as stack:

        def start(*, most_waiting: int = 4, grace_s: float = 10, **settings: Any) -> Served:
            listening = listen("127.0.0.1", 0)
            worker = Worker(model, most_waiting)
            settings = {"max_body_bytes": 2**20, "chat": load_chat_template(model.tokenizer, model.folder), **settings}
            app = make_app(Serving(model=model, name="tiny", worker=worker, **settings))
            server = Server(app, worker, most_waiting, grace_s)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            served = Served(url_of(listening), worker, server, thread)
            stack.callback(served.stop)
            return served

        yield start
