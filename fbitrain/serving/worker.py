"""The thread that generates: one request after the other, in the order in which they came, each choice by itself.

The compiled decoder leaves Python's lock while it computes, so the thread that talks to clients stays free.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from fbitrain.base.errors import UserError
from fbitrain.inference.detokenize import Detokenizer, StopStrings
from fbitrain.inference.generate import Sampling, Token, generate_tokens

if TYPE_CHECKING:
    from fbitrain.loading.model_folder import Pretrained

logger = logging.getLogger(__name__)

STOPPING = "the server is stopping; ask again when it runs"


class Step(NamedTuple):
    """What a choice gained: text, which may be empty, the token if one was drawn, and at the end why it is one."""

    choice: int
    text: str
    token: Token | None = None
    finish: str | None = None  # "stop": EOS or a stop string; "length": max_tokens


class Finished(NamedTuple):
    n_tokens: int  # of all choices


class Failed(NamedTuple):
    message: str
    status: int = 500


Event = Step | Finished | Failed


@dataclass(eq=False)
class Job:
    """What is to be generated: `n` choices for each prompt, `max_new_tokens` being in the sampling of each.

    `deliver` is called in the worker's thread: with Steps, then once with Finished or Failed, unless the job was
    cancelled. It must not raise.
    """

    prompts: list[tuple[list[int], Sampling]]
    n: int
    stops: list[str]
    deliver: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """`most_waiting`: jobs beyond the one that is generated."""

    def __init__(self, model: Pretrained, most_waiting: int) -> None:
        self._model, self._most = model, most_waiting + 1
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished: list[Job] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="generation", daemon=True)
        self._thread.start()

    @property
    def n_jobs(self) -> int:
        """Waiting or being generated, for a client that is there."""
        with self._lock:
            return sum(not job.cancelled.is_set() for job in self._unfinished)

    @property
    def is_full(self) -> bool:
        return self.n_jobs >= self._most

    def submit(self, job: Job) -> bool:
        """False where no more may wait. To be called from one thread."""
        if self.is_full:
            return False
        with self._lock:
            self._unfinished.append(job)
        self._queue.put(job)
        return True

    def abort(self) -> None:
        """Fails the jobs that are there and all to come, from the next token on."""
        self._stopping = True

    def close(self, timeout: float = 10.0) -> None:
        """`abort`, and waits for the thread; it ends within a token or a part of a prompt."""
        self.abort()
        self._queue.put(None)
        self._thread.join(timeout)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                outcome = self._outcome(job)
            except UserError as error:
                outcome = Failed(str(error))
            except Exception:
                logger.exception("a request failed")
                outcome = Failed("the server failed; its log says why")
            with self._lock:
                self._unfinished.remove(job)
            if not job.cancelled.is_set():
                job.deliver(outcome)

    def _outcome(self, job: Job) -> Finished | Failed:
        n_tokens = 0
        for number, (ids, sampling) in enumerate(job.prompts):
            for i in range(job.n):
                seeded = replace(sampling, seed=(sampling.seed + i) % 2**64)
                n_tokens += self._choice(job, number * job.n + i, ids, seeded)
                if self._stopping:
                    return Failed(STOPPING, status=503)
        return Finished(n_tokens)

    def _choice(self, job: Job, number: int, ids: list[int], sampling: Sampling) -> int:
        """Delivers the Steps of a choice; returns the number of its tokens."""

        def wanted() -> bool:
            return not (job.cancelled.is_set() or self._stopping)

        text, stops, n_tokens = Detokenizer(self._model.tokenizer, ids), StopStrings(job.stops), 0
        for token in generate_tokens(self._model.lm, ids, sampling, wanted):
            n_tokens += 1
            piece, ended = stops.add(text.add(token.id))
            job.deliver(Step(number, piece, token, "stop" if ended else None))
            if ended:
                return n_tokens
        if wanted():
            piece, ended = stops.add(text.rest())
            length = n_tokens == sampling.max_new_tokens and not ended
            job.deliver(Step(number, piece + stops.rest(), None, "length" if length else "stop"))
        return n_tokens
