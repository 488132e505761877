"""The session's state machine and the parameters' checks, without sockets."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.errors import RealmError
from realm.gateway.frames import text_frame
from realm.gateway.protocol import FUNCTIONS, GenerateParams, guest_bytes
from realm.gateway.session import Action, CheckKey, Chunk, Close, Invoke, Refuse, Send, Session, State
from realm.registry.records import Principal

ALICE = Principal("alice", "k1", False)


def unlimited() -> None:
    """Any number of calls."""


def open_session(max_calls: int = 8, count_call: Callable[[], None] = unlimited) -> Session:
    session = Session(max_calls)
    assert [type(action) for action in session.opened("Bearer key")] == [CheckKey]
    session.verified(ALICE, count_call)
    return session


def sent(action: Action) -> dict[str, Any]:
    assert isinstance(action, Send)
    message = json.loads(action.payload)
    assert isinstance(message, dict)
    return message


def test_a_key_by_message() -> None:
    session = Session(8)
    (required,) = session.opened(None)
    assert sent(required)["type"] == "auth_required"
    assert session.text(b'{"type":"auth","api_key":"secret"}') == [CheckKey("secret")]
    success, connected = session.verified(ALICE, unlimited)
    assert sent(success)["tenant_id"] == "alice" and sent(connected)["status"] == "connected"
    assert session.state is State.OPEN


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Basic abc", "key"])
def test_a_header_that_is_no_bearer(header: str) -> None:
    failed, close = Session(8).opened(header)
    assert sent(failed)["type"] == "auth_failed"
    assert isinstance(close, Close) and close.code == 4401


def test_after_a_refusal_nothing_counts() -> None:
    session = Session(8)
    session.opened(None)
    session.text(b"{}")
    assert session.text(b'{"type":"auth","api_key":"x"}') == [] and session.binary(bytes(20)) == []
    assert session.verified(ALICE, unlimited) == []


def test_a_late_answer_to_a_closed_session() -> None:
    session = Session(8)
    session.opened("Bearer x")
    session.closed()
    assert session.verified(ALICE, unlimited) == [] and session.principal is None
    assert session.refused("late") == [] and session.no_place(RealmError("rate_limited", "late")) == []


def test_refusals_say_when_to_come_again() -> None:
    session = Session(8)
    session.opened("Bearer x")
    failed, close = session.refused("too many", retry_after=2.5)
    assert sent(failed) == {"type": "auth_failed", "error": "too many", "retry_after": 2.5}
    assert isinstance(close, Close) and close.code == 4401
    session = Session(8)
    session.opened("Bearer x")
    refused, close = session.no_place(RealmError("rate_limited", "too many", retry_after=1.0))
    assert sent(refused)["error"] == {"code": "rate_limited", "message": "too many", "retry_after": 1.0}
    assert isinstance(close, Close) and close.code == 1013
    assert session.text(b'{"id":1,"function":"health"}') == []


def test_frames_before_the_answer_are_a_mistake_of_the_host() -> None:
    session = Session(8)
    session.opened("Bearer x")
    for give in (session.text, session.binary):
        with pytest.raises(AssertionError):
            give(b"{}")


def test_every_frame_is_counted_before_it_is_looked_at() -> None:
    left = 3

    def count_call() -> None:
        nonlocal left
        if not left:
            raise RealmError("rate_limited", "too many calls", retry_after=0.5)
        left -= 1

    session = open_session(count_call=count_call)
    assert isinstance(session.text(b'{"id":1,"function":"health"}')[0], Invoke)
    assert sent(session.text(b"no call")[0])["error"]["code"] == "malformed_message"
    assert sent(session.binary(b"short")[0])["error"]["code"] == "malformed_message"
    for frame, call in (
        (b'{"id":2,"function":"health"}', 2),
        (b'{"id":1,"function":"health"}', 1),
        (b'{"id":"a","function":"nothing","params":[1,2', None),
        (b"no call", None),
    ):
        (refused,) = session.text(frame)
        assert isinstance(refused, Refuse)
        message = json.loads(refused.payload)
        assert message["id"] == call and message["status"] == "error"
        assert message["error"]["code"] == "rate_limited" and message["error"]["retry_after"] == 0.5
    assert isinstance(session.binary(b"short")[0], Refuse)
    assert session.calls == {1}


def test_ids_are_taken_until_finished() -> None:
    session = open_session()
    call = b'{"id":1,"function":"health"}'
    assert isinstance(session.text(call)[0], Invoke)
    assert sent(session.text(call)[0])["error"]["code"] == "duplicate_id"
    session.finished(1)
    assert isinstance(session.text(call)[0], Invoke)


def test_a_refused_call_takes_no_id() -> None:
    session = open_session()
    for frame in (b'{"id":1,"function":"x"}', b'{"id":1,"function":"run"}', b'{"id":1,"function":"keys.list"}'):
        assert sent(session.text(frame)[0])["status"] == "error"
    assert not session.calls


@given(st.binary(max_size=200))
def test_any_text_frame_has_one_answer(data: bytes) -> None:
    (action,) = open_session().text(data)
    assert isinstance(action, Send | Invoke)
    if isinstance(action, Send):
        assert sent(action)["status"] == "error"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(
    call=st.integers() | st.text() | JSON,
    function=st.sampled_from(list(FUNCTIONS)),
    params=JSON
    | st.dictionaries(st.sampled_from(["prompt", "module", "run", "id", "input", "size", "stop", "seed"]), JSON),
)
def test_any_parameters_are_taken_or_refused_by_name(call: Any, function: str, params: Any) -> None:
    session = open_session()
    (action,) = session.text(json.dumps({"id": call, "function": function, "params": params}).encode())
    if isinstance(action, Invoke):
        assert action.function.name == function and action.id == call
        return
    error = sent(action)["error"]
    assert error["code"] in ("invalid_params", "malformed_message", "forbidden")
    if error["code"] == "invalid_params":
        names = [param["name"] for param in FUNCTIONS[function].describe()["params"]]
        assert error["details"]["param"] in [*names, "params"]


@given(st.binary(max_size=64))
def test_any_binary_frame_is_a_chunk_or_an_error(data: bytes) -> None:
    (action,) = open_session().binary(data)
    if len(data) < 16:
        assert sent(action)["error"]["code"] == "malformed_message"
    else:
        assert action == Chunk(int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little"), data[16:])


@given(JSON)
def test_guests_get_texts_as_utf8_and_other_json_as_written(value: Any) -> None:
    import msgspec

    written = json.dumps(value).encode()
    try:
        data = guest_bytes(msgspec.Raw(written), "input", "run")
    except RealmError as error:
        assert error.code == "invalid_params"
        return
    assert data == (value.encode() if isinstance(value, str) else written)


def test_metadata_is_made_of_the_structs() -> None:
    for function in FUNCTIONS.values():
        described = function.describe()
        assert [param["name"] for param in described["params"]] == list(function.params.__struct_fields__)
        assert all(param["doc"] and param["type"] for param in described["params"])
        json.dumps(described)


def test_null_means_the_default() -> None:
    params = FUNCTIONS["generate"].decode(b'{"prompt":"x","max_tokens":null,"temperature":null,"stream":null}')
    assert isinstance(params, GenerateParams)
    assert (params.max_tokens, params.temperature, params.stream, params.seed) == (128, 0.0, False, None)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_text_frames_are_what_the_websockets_package_makes(size: int) -> None:
    from websockets.frames import Frame, Opcode

    payload = b"x" * size
    assert text_frame(payload) == Frame(Opcode.TEXT, payload).serialize(mask=False)
