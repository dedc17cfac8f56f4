"""Serve a model by OpenAI's HTTP API: `fbitrain serve releases/NAME/packed`; http://127.0.0.1:8000/v1 is its base URL.

It answers /v1/models, /v1/completions and /v1/chat/completions, streams too, one request at a time; others wait. If the
environment sets FBITRAIN_API_KEY, requests must bring that key. SIGTERM and Ctrl-C end it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fbitrain.base.command import natural, positive
from fbitrain.base.errors import UserError
from fbitrain.commands.arguments import add_activations

API_KEY = "FBITRAIN_API_KEY"


def main(arguments: argparse.Namespace) -> None:
    from fbitrain.loading.chat_template import ChatTemplate, load_chat_template
    from fbitrain.loading.model_folder import open_model
    from fbitrain.serving.app import Serving, make_app
    from fbitrain.serving.server import Server, is_loopback, listen, url_of
    from fbitrain.serving.worker import Worker

    with (
        listen(arguments.host, arguments.port) as listening,
        open_model(arguments.model, arguments.dtype, activations=arguments.activations) as model,
    ):
        chat: ChatTemplate | str
        try:
            chat = load_chat_template(model.tokenizer, model.folder)
        except UserError as error:
            chat = str(error)
        worker = Worker(model, arguments.queue)
        serving = Serving(
            model=model,
            name=arguments.name or str(arguments.model),
            worker=worker,
            chat=chat,
            max_body_bytes=arguments.max_body,
            api_key=os.environ.get(API_KEY, ""),
            loopback_only=is_loopback(listening),
        )
        print(f"serving {serving.name} at {url_of(listening)}/v1 on {model.runs_on}", flush=True)
        if isinstance(chat, str):
            print(f"/v1/chat/completions is refused: {chat}", file=sys.stderr)
        if not serving.loopback_only and not serving.api_key:
            print(f"anyone who reaches {arguments.host} can use it; {API_KEY} sets a key to ask for", file=sys.stderr)
        try:
            Server(make_app(serving), worker, arguments.queue, arguments.grace).run(sockets=[listening])
        finally:
            worker.close()


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain serve", description=__doc__)
    commands.add_argument("model", type=Path, help="a released folder, another Hugging Face folder, or a .gguf file")
    commands.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    commands.add_argument("--port", type=natural, default=8000, help="0 lets the system choose (default 8000)")
    commands.add_argument("--name", default="", help="what requests call the model (default: as it is named here)")
    commands.add_argument(
        "--queue", type=natural, default=16, help="requests that may wait; others get 503 (default 16)"
    )
    commands.add_argument(
        "--max-body", type=positive, default=2**20, metavar="BYTES", help="of a request (default 1048576)"
    )
    commands.add_argument(
        "--grace", type=natural, default=30, metavar="S", help="seconds for requests in flight at the end (default 30)"
    )
    commands.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add_activations(commands)
    return commands
