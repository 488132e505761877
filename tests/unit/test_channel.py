"""Frames between processes: any split of the bytes, both pipes full, a peer that lies or goes."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.channel import MAX_FRAME, BlockingChannel, ChannelClosed, FrameBuffer, frame
from realm.messages import ToEngine, WorkerHello, WorkerTurn


@given(st.lists(st.binary(max_size=300)), st.data())
def test_any_split_gives_the_same_frames(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frame(payload) for payload in payloads)
    buffer, got = FrameBuffer(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        buffer.feed(stream[:size])
        stream = stream[size:]
        while (payload := buffer.pop()) is not None:
            got.append(payload)
    assert got == payloads
    assert buffer.pop() is None


def test_a_hostile_length_is_refused_before_anything_is_kept() -> None:
    with pytest.raises(ValueError, match="over the limit"):
        FrameBuffer().feed(struct.pack("<I", MAX_FRAME + 1))


def pair() -> tuple[BlockingChannel[object], BlockingChannel[object]]:
    a, b = socket.socketpair()
    return BlockingChannel(a, ToEngine), BlockingChannel(b, ToEngine)


def test_messages_arrive_in_order_and_typed() -> None:
    a, b = pair()
    a.send(WorkerHello(3, 99))
    a.send(WorkerTurn([], 5))
    assert b.receive() == [WorkerHello(3, 99), WorkerTurn([], 5)]
    assert b.receive() == []
    a.close()
    b.close()


def test_two_full_pipes_do_not_lock_up() -> None:
    a, b = socket.socketpair()
    left: BlockingChannel[bytes] = BlockingChannel(a, bytes)
    right: BlockingChannel[bytes] = BlockingChannel(b, bytes)
    big = bytes(8 << 20)
    got: list[bytes] = []

    def other_end() -> None:
        left.send(big)
        while not got:
            got.extend(left.receive())

    thread = threading.Thread(target=other_end, daemon=True)
    thread.start()
    right.send(big)
    # As in a process's loop: whoever has sent goes on to receive.
    while not (back := right.receive()):
        pass
    thread.join(10)
    assert got == back == [big]
    left.close()
    right.close()


def test_what_was_read_while_sending_waits_although_select_knows_nothing_of_it() -> None:
    left, right = pair()
    big = WorkerTurn([], 7, bytes(4 << 20))

    def other_end() -> None:
        while not right.waiting:
            time.sleep(0.001)
        while not left.receive():
            select.select([left], [], [], 10)

    assert not right.waiting
    left.send(WorkerHello(3, 99))
    thread = threading.Thread(target=other_end, daemon=True)
    thread.start()
    # Nobody takes it before this end has read what came meanwhile.
    right.send(big)
    thread.join(10)
    assert right.waiting
    assert not select.select([right], [], [], 0)[0]
    assert right.receive() == [WorkerHello(3, 99)]
    assert not right.waiting
    left.close()
    right.close()


def test_a_closed_peer_is_said_so_on_both_ways() -> None:
    a, b = pair()
    a.close()
    with pytest.raises(ChannelClosed):
        b.receive()
    with pytest.raises(ChannelClosed):
        for _ in range(10):
            b.send(WorkerTurn([], 1))
    b.close()


def test_the_last_words_of_a_closed_peer_are_heard() -> None:
    a, b = pair()
    a.send(WorkerHello(3, 99))
    a.close()
    assert b.receive() == [WorkerHello(3, 99)]
    with pytest.raises(ChannelClosed):
        b.receive()
    b.close()


@pytest.mark.parametrize("payload", [b"\xc1", b"\x92\xa5other\x01", b"\x92\xa5hello\xa1x", b""])
def test_a_frame_that_is_no_message_raises(payload: bytes) -> None:
    a, b = socket.socketpair()
    channel: BlockingChannel[object] = BlockingChannel(b, ToEngine)
    a.sendall(frame(payload))
    with pytest.raises(msgspec.MsgspecError):
        channel.receive()
    a.close()
    channel.close()
