"""The sans-I/O core: every frame a server may send, and those it must not."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from realm_sdk import AuthenticationError, InvalidRequest, ProtocolError
from realm_sdk.errors import (
    AdapterRefused,
    GuestFailed,
    LimitExceeded,
    ModuleRefused,
    NotFound,
    PermissionDenied,
    RateLimited,
    RealmError,
    Unavailable,
    error_of,
)
from realm_sdk.protocol import Ack, Done, Failed, Item, NeedAuth, Opened, Protocol, UploadFailed


def opened() -> Protocol:
    protocol = Protocol("k-1")
    assert protocol.receive('{"type":"auth_success","tenant_id":"a"}') is None
    assert protocol.receive('{"status":"connected","version":"1","tenant_id":"a"}') == Opened("a", "1")
    return protocol


def test_key_goes_into_the_handshake_and_into_the_auth_frame() -> None:
    protocol = Protocol("k-1")
    assert protocol.headers() == {"Authorization": "Bearer k-1"}
    event = protocol.receive('{"type":"auth_required","message":"please"}')
    assert isinstance(event, NeedAuth)
    assert json.loads(event.frame) == {"type": "auth", "api_key": "k-1"}


@pytest.mark.parametrize("key", ["", "a\r\nX-Other: 1", "clé", "a\x00b"])
def test_key_that_cannot_be_a_header_is_refused(key: str) -> None:
    with pytest.raises(AuthenticationError, match="auth_failed"):
        Protocol(key)


@pytest.mark.parametrize("error", ['"bad key"', '{"code":"auth_failed","message":"bad key"}'])
def test_auth_failed(error: str) -> None:
    with pytest.raises(AuthenticationError, match="bad key"):
        Protocol("k").receive('{"type":"auth_failed","error":' + error + "}")


def test_ids_are_unique_and_frames_are_calls() -> None:
    protocol = opened()
    first, frame = protocol.call("ps", {"all": True})
    second, _ = protocol.call("ps", {})
    assert first != second
    assert json.loads(frame) == {"id": first, "function": "ps", "params": {"all": True}}


def test_answers_of_two_calls_interleave() -> None:
    protocol = opened()
    a, _ = protocol.call("run", {})
    b, _ = protocol.call("run", {})

    def item(call: int, seq: int) -> str:
        return json.dumps({"id": call, "status": "streaming", "seq": seq, "data": {"n": seq}})

    for call, seq in [(b, 0), (a, 0), (b, 1), (a, 1)]:
        event = protocol.receive(item(call, seq))
        assert isinstance(event, Item)
        assert (event.call, json.loads(bytes(event.data))) == (call, {"n": seq})
    done = protocol.receive(json.dumps({"id": b, "status": "complete", "data": {"code": 0}}))
    assert isinstance(done, Done) and not done.cancelled and done.call == b
    done = protocol.receive(json.dumps({"id": a, "status": "cancelled", "data": {}}))
    assert isinstance(done, Done) and done.cancelled


def test_error_of_a_call_keeps_everything() -> None:
    protocol = opened()
    call, _ = protocol.call("run", {})
    frame = {"code": "busy", "message": "later", "details": {"limit": 3}, "retry_after": 0.5}
    event = protocol.receive(json.dumps({"id": call, "status": "error", "error": frame}))
    assert isinstance(event, Failed)
    error = event.error
    assert isinstance(error, Unavailable)
    assert (error.code, error.message, error.details, error.retry_after) == ("busy", "later", {"limit": 3}, 0.5)


def test_unknown_fields_and_types_of_newer_servers_are_ignored() -> None:
    protocol = opened()
    call, _ = protocol.call("ps", {})
    assert protocol.receive('{"type":"notice","text":"hi","level":3}') is None
    event = protocol.receive(json.dumps({"id": call, "status": "complete", "data": {}, "took": 1, "trace": []}))
    assert isinstance(event, Done)


def test_upload_frames() -> None:
    protocol = opened()
    assert Protocol.chunk(7, 1 << 33, b"abc") == struct.pack("<QQ", 7, 1 << 33) + b"abc"
    assert protocol.receive('{"type":"upload_ack","upload":7,"received":3}') == Ack(7, 3)
    event = protocol.receive('{"type":"upload_error","upload":7,"error":{"code":"upload_size","message":"m"}}')
    assert isinstance(event, UploadFailed)
    assert isinstance(event.error, ModuleRefused)


@pytest.mark.parametrize(
    "frame",
    [
        "",
        "not json",
        "[]",
        '{"status":"streaming"',
        "[" * 100_000,
        '{"id":{},"status":"complete"}',
        '{"id":true,"status":"complete"}',
        '{"id":99,"status":"complete","data":{}}',
        '{"id":"0","status":"complete","data":{}}',
        '{"id":0,"status":"odd","data":{}}',
        '{"id":0,"data":{}}',
        '{"id":0,"status":"streaming","seq":1,"data":{}}',
        '{"id":0,"status":"streaming","seq":-1,"data":{}}',
        '{"id":null,"status":"error","error":{"code":"malformed_message","message":"m"}}',
        '{"id":0,"status":"error","error":{"message":"no code"}}',
        b"\x00\x01",
    ],
)
def test_frames_outside_the_protocol_are_refused(frame: str | bytes) -> None:
    protocol = opened()
    assert protocol.call("run", {})[0] == 0
    with pytest.raises(ProtocolError) as caught:
        protocol.receive(frame)
    assert caught.value.code == "protocol_error"


def test_answer_before_the_opening_is_refused() -> None:
    with pytest.raises(ProtocolError, match="connected"):
        Protocol("k").receive('{"id":0,"status":"complete","data":{}}')


def test_a_call_is_over_after_its_last_message() -> None:
    protocol = opened()
    call, _ = protocol.call("ps", {})
    last = json.dumps({"id": call, "status": "complete", "data": {}})
    protocol.receive(last)
    with pytest.raises(ProtocolError, match="not in progress"):
        protocol.receive(last)


@pytest.mark.parametrize("value", [object(), {1: object()}, {"a": {object()}}])
def test_parameters_that_are_not_json(value: Any) -> None:
    protocol = opened()
    with pytest.raises(InvalidRequest) as caught:
        protocol.call("run", {"input": value})
    assert caught.value.code == "invalid_params"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("auth_failed", AuthenticationError),
        ("forbidden", PermissionDenied),
        ("tenant_mismatch", PermissionDenied),
        ("module_not_found", NotFound),
        ("upload_not_found", NotFound),
        ("invalid_params", InvalidRequest),
        ("context_length_exceeded", InvalidRequest),
        ("module_import_unknown", ModuleRefused),
        ("compile_limit", ModuleRefused),
        ("upload_hash_mismatch", ModuleRefused),
        ("adapter_invalid", AdapterRefused),
        ("adapter_too_large", AdapterRefused),
        ("adapter_not_found", NotFound),
        ("adapter_something_new", RealmError),
        ("guest_trap", GuestFailed),
        ("fuel_exhausted", LimitExceeded),
        ("limit_exceeded", LimitExceeded),
        ("first_call_timeout", LimitExceeded),
        ("rate_limited", RateLimited),
        ("artifact_damaged", Unavailable),
        ("engine_lost", Unavailable),
        ("something_new", RealmError),
    ],
)
def test_codes_have_classes(code: str, kind: type[RealmError]) -> None:
    error = error_of(code, "m")
    assert type(error) is kind
    assert str(error) == f"{code}: m"
