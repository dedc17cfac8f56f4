"""One attempt: ranks on all nodes that answer, from their start until none of them is left anywhere."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fbitrain.supervising.nodes import LOCAL, Node, Reach, handed_on

BEAT_S = 1.0
LAST_WORDS_S = 5.0  # for the other ranks to say what they know of the first that failed
LEAVING_S = 300.0  # for the other ranks to end after one has ended well


@dataclass(frozen=True)
class Patience:
    """Seconds that the supervisor waits for what."""

    connect_s: float = 60.0  # an agent to answer; a node that does not is left out
    silence_s: float = 30.0  # a word from an agent; a node that says nothing for longer is lost
    grace_s: float = 600.0  # the ranks to save and leave after a stop signal

    @property
    def lease_s(self) -> float:
        """After this long without a word from us an agent ends its ranks; beats cease where no answer comes."""
        return self.silence_s / 2


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    kind: str  # ended (all ranks well), stopped (as asked), failed
    reason: str = ""
    ranks: int = 0
    nodes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()  # nodes that did not answer
    restart_mends: bool | None = None


@dataclass
class StopRequest:
    """A signal that asks the supervisor to stop; a second one says at once."""

    number: int = 0
    times: int = 0

    def note(self, number: int, *_: object) -> None:
        self.number, self.times = self.number or number, self.times + 1


class AgentProcess:
    """The way to a node's agent: a process of ours, such as ssh, whose ends are the agent's."""

    def __init__(self, node: Node, command: Sequence[str], heard: queue.Queue[tuple[AgentProcess, Any]]) -> None:
        self.node, self.ranks = node, list[int]()
        self.port = 0  # one that was free on the node when its agent began
        self.gone = self.lost = False
        self.heard_at = self.sent_at = time.monotonic()
        self._heard = heard
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=1,  # what the ranks print
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is ours to hand on
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # a way that is blocked must not block us
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # a login shell may greet
                if isinstance(message := json.loads(line), dict):
                    self._heard.put((self, message))
        self._heard.put((self, None))

    def send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):
            os.write(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")
        if "end" not in message:
            self.sent_at = time.monotonic()

    def close(self) -> None:
        """Ends the way, and with it an agent on this machine and its ranks."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(2.0)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


@dataclass
class Attempt:
    """Starts `command` once for each rank and looks after them; `run` is called once."""

    nodes: Sequence[Node]
    reach: Reach
    command: Sequence[str]
    patience: Patience
    stop: StopRequest
    least_ranks: int = 1
    say: Callable[[str], None] = print
    _heard: queue.Queue[tuple[AgentProcess, Any]] = field(default_factory=queue.Queue)
    _agents: list[AgentProcess] = field(default_factory=list)  # those that answered
    _left: set[int] = field(default_factory=set)  # ranks that run
    _failures: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)  # rank, and how it ended
    _lost: list[str] = field(default_factory=list)  # nodes that fell silent
    _deadline: float = float("inf")
    _signalled: int = 0

    def run(self) -> End:
        left_out = self._connect()
        n_ranks = sum(agent.node.slots for agent in self._agents)
        about: dict[str, Any] = {
            "ranks": n_ranks,
            "nodes": tuple(agent.node.name for agent in self._agents),
            "left_out": left_out,
        }
        try:
            if self.stop.times:
                return End("stopped", "a signal before the ranks were started", **about)
            if n_ranks < self.least_ranks:
                missing = f"of {', '.join(left_out)} no answer came within {self.patience.connect_s:g} s"
                few = f"{n_ranks} ranks are left and --min-ranks is {self.least_ranks}"
                return End("failed", f"{few}: {missing}", restart_mends=True, **about)
            self._start(n_ranks)
            self._watch()
            return self._end(about)
        finally:
            self._clear()

    def _connect(self) -> tuple[str, ...]:
        """Starts the agents; returns the names of the nodes that did not answer."""
        pending = [AgentProcess(node, self.reach.command(node), self._heard) for node in self.nodes]
        deadline = time.monotonic() + self.patience.connect_s
        while pending and time.monotonic() < deadline and self.stop.times < 2:
            with suppress(queue.Empty):
                agent, message = self._heard.get(timeout=0.2)
                if message is None:
                    pending.remove(agent)
                    agent.lost = True
                elif "hello" in message:
                    pending.remove(agent)
                    agent.port, agent.heard_at = message["port"], time.monotonic()
                    self._agents.append(agent)
            for agent in self._agents:  # those that wait for the others
                agent.send({"beat": 0})
        found = {agent.node.name for agent in self._agents}
        for agent in pending:
            agent.close()
        self._agents.sort(key=lambda agent: self.nodes.index(agent.node))
        return tuple(node.name for node in self.nodes if node.name not in found)

    def _start(self, n_ranks: int) -> None:
        first = self._agents[0]
        alone = len(self._agents) == 1
        place = {"MASTER_ADDR": "127.0.0.1" if alone or first.node.name == LOCAL else first.node.name}
        place |= {"MASTER_PORT": str(first.port), "WORLD_SIZE": str(n_ranks)}
        rank = 0
        for agent in self._agents:
            slots = agent.node.slots
            agent.ranks = list(range(rank, rank + slots))
            rank += slots
            ranks = [
                {"RANK": str(number), "LOCAL_RANK": str(i), "LOCAL_SIZE": str(slots)}
                for i, number in enumerate(agent.ranks)
            ]
            start: dict[str, Any] = {"command": list(self.command), "cwd": os.getcwd(), "ranks": ranks}
            start |= {"environ": {**handed_on(os.environ), **place}, "lease_s": self.patience.lease_s}
            agent.heard_at = time.monotonic()
            agent.send({"start": start})
        self._left = set(range(n_ranks))

    def _watch(self) -> None:
        """Until all ranks have ended, or those that are left are not worth waiting for."""
        while self._left and time.monotonic() < self._deadline and self.stop.times < 2:
            with suppress(queue.Empty):
                agent, message = self._heard.get(timeout=BEAT_S / 2)
                self._take(agent, message)
                while True:
                    self._take(*self._heard.get_nowait())
            self._look_at_agents()
            if self.stop.times and not self._signalled:
                self._signalled = signal.SIGTERM
                self.say(
                    f"stopping; what is running may save (up to {self.patience.grace_s:g} s), a second signal ends it"
                )
                self._expect(self.patience.grace_s)
                for agent in self._agents:
                    agent.send({"signal": self._signalled})

    def _take(self, agent: AgentProcess, message: Any) -> None:
        if agent not in self._agents:  # of a node that was left out
            return
        agent.heard_at = time.monotonic()
        if message is None:
            self._lose(agent, "the connection to it ended")
        elif "exit" in message:
            rank = agent.ranks[message["exit"]]
            self._left.discard(rank)
            if message["code"]:
                self._failures.append((rank, message))
                self._expect(LAST_WORDS_S)
            else:
                self._expect(LEAVING_S)
        elif "gone" in message:
            agent.gone = True

    def _look_at_agents(self) -> None:
        now = time.monotonic()
        for agent in self._agents:
            silent = now - agent.heard_at
            if silent > self.patience.silence_s:
                self._lose(agent, f"nothing was heard of it for {silent:.0f} s")
            elif now - agent.sent_at >= BEAT_S and silent < self.patience.silence_s / 3 and not agent.lost:
                agent.send({"beat": 1})

    def _lose(self, agent: AgentProcess, why: str) -> None:
        if not (agent.lost or agent.gone):
            agent.lost = True
            self._lost.append(f"node {agent.node.name} is lost: {why}")
            self._left -= set(agent.ranks)
            self._expect(0.0)

    def _expect(self, seconds: float) -> None:
        """The ranks that are left have this long to end."""
        if not self._signalled or seconds == self.patience.grace_s:
            self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _end(self, about: Mapping[str, Any]) -> End:
        if self.stop.times:
            saved = not (self._failures or self._lost or self._left)
            return End("stopped", "" if saved else "not all ranks ended well", **about)
        if self._lost:
            return End("failed", "; ".join(self._lost), restart_mends=True, **about)
        if self._failures:
            # The first rank to go may have been one that only heard of another.
            own = [found for found in self._failures if not found[1].get("echo")]
            crashed = [found for found in own if "error" not in found[1]]
            rank, how = (crashed or own or self._failures)[0]
            mends = True if crashed else how.get("restart_mends")
            return End("failed", f"rank {rank} {_ending(how)}", restart_mends=mends, **about)
        if self._left:
            text = f"ranks {sorted(self._left)} did not end within {LEAVING_S:g} s of the others"
            return End("failed", text, restart_mends=True, **about)
        return End("ended", **about)

    def _clear(self) -> None:
        """Returns when no rank is left: ended by its agent, or, where no agent answers, by the end of its lease."""
        for agent in self._agents:
            agent.send({"end": True})
        deadline = time.monotonic() + 10.0
        while any(not (agent.gone or agent.lost) for agent in self._agents) and time.monotonic() < deadline:
            with suppress(queue.Empty):
                agent, message = self._heard.get(timeout=0.2)
                agent.gone |= message is not None and "gone" in message
                agent.lost |= message is None and not agent.gone
        for agent in self._agents:
            agent.close()
        unheard = [agent.sent_at for agent in self._agents if agent.ranks and not agent.gone]
        if unheard:
            time.sleep(max(0.0, max(unheard) + self.patience.lease_s + 1.0 - time.monotonic()))


def _ending(how: Mapping[str, Any]) -> str:
    if "error" in how:
        return f"ended with: {how['error']}"
    code = int(how["code"])
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"was ended by {name}"
    return f"ended with exit code {code}; its own last lines say why"
