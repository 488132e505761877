"""A worker's or the gateway's end of an engine's socket."""

from __future__ import annotations

import select
import time
from typing import Any

from realm.channel import BlockingChannel, ChannelClosed, connect
from realm.engine.answers import as_messages
from realm.engine.workers import WORKER_SHIFT
from realm.messages import (
    AdapterStates,
    EngineReady,
    EngineReply,
    EngineResult,
    EngineStats,
    Forward,
    OpenSequence,
    SamplingParams,
)
from tests.tiny import pack

FROM_ENGINE = EngineReply | EngineReady | EngineStats | AdapterStates


class Link:
    """A worker's or the gateway's end."""

    def __init__(self, path: str, worker: int = 0) -> None:
        self.worker = worker
        self.sock = connect(path)
        self.channel: BlockingChannel[Any] = BlockingChannel(self.sock, FROM_ENGINE)
        self.inbox: list[Any] = []

    def next(self, seconds: float = 20) -> Any:
        deadline = time.monotonic() + seconds
        while not self.inbox:
            assert time.monotonic() < deadline, "the engine does not answer"
            select.select([self.channel], [], [], 0.2)
            self.inbox += self.channel.receive()
        return self.inbox.pop(0)

    def poll(self) -> None:
        """Take in what has arrived."""
        select.select([self.channel], [], [], 0.001)
        self.inbox += self.channel.receive()

    def gone(self) -> bool:
        """Whether the engine has closed the link."""
        try:
            self.next()
        except (ChannelClosed, ConnectionError):
            return True
        return False

    def results(self) -> list[EngineResult]:
        """Of the next reply, rows with the messages."""
        reply = self.next()
        assert isinstance(reply, EngineReply)
        return as_messages(reply.results, reply.drawn)

    def seq(self, number: int) -> int:
        return (self.worker << WORKER_SHIFT) + number

    def call(self, number: int, seq: int, count: int = 3) -> list[Any]:
        return [OpenSequence(self.seq(seq), f"t{seq}", 1), self.forward(number, seq, [5] * count)]

    def forward(self, call: int, seq: int, tokens: list[int], *, logits: bool = False) -> Forward:
        return Forward(call, self.seq(seq), pack(tokens), SamplingParams(), logits)
