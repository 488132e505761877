"""The functions of the wire protocol as data: parameters, checks, documentation.

Each function's parameters are one struct. It checks a call's ``params``, and ``metadata`` and the
list of functions are derived from it, so they cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from realm.errors import RealmError
from realm.run_messages import ErrorInfo

PROTOCOL = "realm.v1"
MAX_SEED = 2**64 - 1

# \Z, because $ also matches before a final newline.
_MODULE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z"
_TENANT_NAME = r"^[a-z0-9][a-z0-9_.-]{0,62}\Z"
_RUN_ID = r"^r[1-9][0-9]{0,17}\Z"
_SHA256 = r"^[0-9a-f]{64}\Z"
_IN_WORDS = {
    _MODULE_NAME: "must be 1 to 64 of A-Z, a-z, 0-9, '_', '.' and '-', and begin with a letter or a digit",
    _TENANT_NAME: "must be 1 to 63 of a-z, 0-9, '_', '.' and '-', and begin with a letter or a digit",
    _RUN_ID: "must be a run's id, text such as r17",
    _SHA256: "must be 64 of 0-9 and a-f",
}
"""What each pattern asks for: a client's user is not shown a regular expression."""

ModuleName = Annotated[str, Meta(pattern=_MODULE_NAME)]
TenantName = Annotated[str, Meta(pattern=_TENANT_NAME)]
RunId = Annotated[str, Meta(pattern=_RUN_ID)]
CallId = Annotated[int, Meta(ge=-(2**53), le=2**53)] | Annotated[str, Meta(max_length=128)]
"""What a client may name a call: an integer that JSON keeps exact, or a short text."""


class Params(msgspec.Struct, kw_only=True):
    """Base of every function's parameters. Unknown ones are ignored; null means the default."""


class Message(msgspec.Struct):
    """One message of a conversation."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str


class NoParams(Params):
    pass


class GenerateParams(Params):
    prompt: Annotated[str, Meta(description="text to go on from (or `messages`)")] | None = None
    messages: (
        Annotated[list[Message], Meta(description="conversation for the model's chat template (or `prompt`)")] | None
    ) = None
    model: Annotated[str, Meta(description="name of the served model")] | None = None
    adapter: Annotated[ModuleName, Meta(description="name of an adapter of this tenant, or of a shared one")] | None = (
        None
    )
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 20, description="most tokens to generate")] | None = 128
    temperature: Annotated[float, Meta(ge=0, le=100, description="0 is greedy")] | None = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1, description="mass of the tokens kept; 1 is off")] | None = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1 << 20, description="tokens kept; 0 is off")] | None = 0
    min_p: Annotated[float, Meta(ge=0, le=1, description="part of the best one's probability; 0 is off")] | None = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100, description="over the whole sequence; 1 is off")] | None = (
        1.0
    )
    seed: Annotated[int, Meta(ge=0, description="64 bits; random when not given")] | None = None
    stop: (
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=256)]],
            Meta(max_length=8, description="texts that end the generation"),
        ]
        | None
    ) = None
    stream: Annotated[bool, Meta(description="send the text in pieces as it comes")] | None = False


class RunParams(Params):
    module: Annotated[ModuleName, Meta(description="name of a module of this tenant")]
    input: Annotated[msgspec.Raw, Meta(description="text, or any JSON, which the guest gets as JSON text")] = (
        msgspec.Raw(b'""')
    )
    seed: Annotated[int, Meta(ge=0, description="64 bits; random when not given")] | None = None
    stream: Annotated[bool, Meta(description="send output and log as they come")] | None = True


class SendParams(Params):
    run: Annotated[RunId, Meta(description="id of a run in progress")]
    data: Annotated[msgspec.Raw, Meta(description="text, or any JSON, which the guest gets as JSON text")]


class CancelParams(Params):
    run: Annotated[RunId, Meta(description="id of a run (or `id`)")] | None = None
    id: Annotated[CallId, Meta(description="id of a call of this connection (or `run`)")] | None = None


class PsParams(Params):
    all: Annotated[bool, Meta(description="finished runs, too")] | None = False
    limit: Annotated[int, Meta(ge=1, le=1000, description="most runs to list")] | None = 50


class LogsParams(Params):
    run: Annotated[RunId, Meta(description="id of a run")]


class BeginParams(Params):
    name: Annotated[ModuleName, Meta(description="letters, digits, and - _ . inside, at most 64")]
    size: Annotated[int, Meta(ge=0, le=1 << 53, description="bytes")]
    sha256: Annotated[str, Meta(pattern=_SHA256, description="of the whole content, lower-case hex")]


class UploadParams(Params):
    upload: Annotated[int, Meta(ge=0, le=1 << 53, description="number that modules.begin or adapters.begin gave")]


class NameParams(Params):
    name: Annotated[ModuleName, Meta(description="name of a module of this tenant")]


class BeginAdapterParams(Params):
    name: Annotated[ModuleName, Meta(description="letters, digits, and - _ . inside, at most 64")]
    size: Annotated[int, Meta(ge=0, le=1 << 53, description="bytes of adapter_model.safetensors")]
    sha256: Annotated[str, Meta(pattern=_SHA256, description="of adapter_model.safetensors, lower-case hex")]
    config: Annotated[msgspec.Raw, Meta(description="what adapter_config.json holds: a JSON object")]
    model: Annotated[str, Meta(description="name of the served model, which the adapter is for")] | None = None


class AdapterParams(Params):
    name: Annotated[ModuleName, Meta(description="name of an adapter of this tenant")]


class PinParams(AdapterParams):
    pinned: Annotated[bool, Meta(description="keep it ready for the next step, or no more")]


class ShareParams(AdapterParams):
    shared: Annotated[bool, Meta(description="let all tenants use it, or no more")]


class AddTenantParams(Params):
    name: Annotated[TenantName, Meta(description="lower-case letters, digits, and - _ . inside, at most 63")]


class ShowTenantParams(Params):
    name: (
        Annotated[TenantName, Meta(description="name of a tenant; without, what counts for all (admin key)")] | None
    ) = None


class SetLimitsParams(Params):
    limits: Annotated[
        dict[Annotated[str, Meta(max_length=64)], int | None],
        Meta(description="limits by their names; null returns one to the default", max_length=64),
    ]
    name: Annotated[TenantName, Meta(description="name of a tenant; without, the default of all tenants")] | None = None


class AddKeyParams(Params):
    tenant: Annotated[TenantName, Meta(description="name of a tenant")]


class ListKeysParams(Params):
    tenant: Annotated[TenantName, Meta(description="only this tenant's")] | None = None


class RevokeParams(Params):
    id: Annotated[str, Meta(max_length=64, description="the key's id, which is not the key")]


class Function:
    """One function of the protocol."""

    def __init__(
        self, name: str, params: type[Params], doc: str, *, admin: bool = False, streams: bool = False
    ) -> None:
        self.name = name
        self.params = params
        self.doc = doc
        self.admin = admin
        self.streams = streams
        self._decoder = msgspec.json.Decoder(params)
        self._defaults = {
            field.encode_name: field.default
            for field in msgspec.structs.fields(params)
            if field.default is not msgspec.NODEFAULT and field.default is not None
        }

    def decode(self, data: bytes | msgspec.Raw) -> Params:
        """Check JSON text against the parameters' struct.

        Raises:
            RealmError: ``invalid_params``; ``details.param`` names the parameter, if it is one's fault.
        """
        try:
            params = self._decoder.decode(data)
        except msgspec.ValidationError as error:
            raise self._invalid(str(error)) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise RealmError("malformed_message", f"params are not JSON: {error}") from None
        for name, default in self._defaults.items():
            if getattr(params, name) is None:
                setattr(params, name, default)
        return params

    def _invalid(self, text: str) -> RealmError:
        path = re.search(r"`\$\.(\w+)", text)
        missing = re.search(r"missing required field `(\w+)`", text)
        name = path.group(1) if path else missing.group(1) if missing else "params"
        for pattern, words in _IN_WORDS.items():
            # The text holds the pattern as a Python literal.
            if repr(pattern) in text:
                text = words
        return invalid_params(name, text, function=self.name)

    def describe(self) -> dict[str, Any]:
        """The entry of ``metadata``."""
        hints = get_type_hints(self.params, include_extras=True)
        described: list[dict[str, Any]] = []
        for field in msgspec.structs.fields(self.params):
            entry: dict[str, Any] = {
                "name": field.encode_name,
                "type": type_name(hints[field.name]),
                "required": field.required,
                "doc": documentation(hints[field.name]),
            }
            if field.encode_name in self._defaults and not isinstance(field.default, msgspec.Raw):
                entry["default"] = field.default
            described.append(entry)
        return {
            "name": self.name,
            "doc": self.doc,
            "admin": self.admin,
            "streams": self.streams,
            "params": described,
        }


def invalid_params(name: str, reason: str, *, function: str) -> RealmError:
    """The error for a parameter that cannot be used."""
    return RealmError(
        "invalid_params", f"{function}: parameter {name!r}: {reason}", details={"param": name, "function": function}
    )


def documentation(hint: Any) -> str:
    """The outermost description in a parameter's type."""
    if get_origin(hint) is Annotated:
        for meta in hint.__metadata__:
            if isinstance(meta, Meta) and meta.description:
                return meta.description
        return documentation(hint.__origin__)
    return next((text for part in get_args(hint) if (text := documentation(part))), "")


_TYPE_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", msgspec.Raw: "any"}


def type_name(hint: Any) -> str:
    """A parameter's type in the words of JSON; ``|`` parts alternatives, null is left out."""
    if get_origin(hint) is Annotated:
        return type_name(hint.__origin__)
    if get_origin(hint) is list:
        return f"array of {type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "object"
    if alternatives := get_args(hint):
        return "|".join(type_name(part) for part in alternatives if part is not type(None))
    return _TYPE_NAMES.get(hint, "object")


_ALL = (
    Function("generate", GenerateParams, "Generate text with the served model", streams=True),
    Function("run", RunParams, "Run one of the tenant's guest modules", streams=True),
    Function("send", SendParams, "Give a message to a running guest"),
    Function("cancel", CancelParams, "Stop a run, or a call of this connection"),
    Function("ps", PsParams, "List runs, with the engine's counters"),
    Function("logs", LogsParams, "What a run logged"),
    Function("modules.begin", BeginParams, "Begin to upload a module"),
    Function("modules.commit", UploadParams, "Check, compile and name an uploaded module"),
    Function("modules.abort", UploadParams, "Give an upload up"),
    Function("modules.list", NoParams, "List the tenant's modules"),
    Function("modules.remove", NameParams, "Remove a module with all its versions"),
    Function("adapters.begin", BeginAdapterParams, "Begin to upload an adapter's weights"),
    Function("adapters.commit", UploadParams, "Check and name an uploaded adapter"),
    Function("adapters.abort", UploadParams, "Give an upload up"),
    Function("adapters.list", NoParams, "List the tenant's adapters, and shared ones"),
    Function("adapters.show", AdapterParams, "One adapter, and where the engine has it"),
    Function("adapters.pin", PinParams, "Keep an adapter ready for the next step"),
    Function("adapters.share", ShareParams, "Let all tenants use an adapter of the admin tenant", admin=True),
    Function("adapters.remove", AdapterParams, "Remove an adapter"),
    Function("models.list", NoParams, "List the models of this host"),
    Function("health", NoParams, "How the host is"),
    Function("metadata", NoParams, "The functions of this protocol"),
    Function("tenants.add", AddTenantParams, "Add a tenant", admin=True),
    Function("tenants.list", NoParams, "List tenants", admin=True),
    Function("tenants.show", ShowTenantParams, "All limits of a tenant, with what it uses"),
    Function("tenants.set", SetLimitsParams, "Set limits of a tenant, or of all", admin=True),
    Function("keys.add", AddKeyParams, "Make a key for a tenant; it is shown once", admin=True),
    Function("keys.list", ListKeysParams, "List keys, without their secrets", admin=True),
    Function("keys.revoke", RevokeParams, "Revoke a key and close its connections", admin=True),
)
FUNCTIONS: dict[str, Function] = {function.name: function for function in _ALL}


class Envelope(msgspec.Struct):
    """A call, before its parameters are looked at."""

    id: CallId
    function: str
    params: msgspec.Raw = msgspec.Raw(b"{}")
    tenant_id: str | None = None


class Auth(msgspec.Struct, tag_field="type", tag="auth"):
    """The message that names the key."""

    api_key: Annotated[str, Meta(max_length=512)]


class _OnlyId(msgspec.Struct):
    id: CallId | None = None


_envelope = msgspec.json.Decoder(Envelope)
_auth = msgspec.json.Decoder(Auth)
_only_id = msgspec.json.Decoder(_OnlyId)
_encoder = msgspec.json.Encoder()
encode: Callable[[Any], bytes] = _encoder.encode

_BAD_JSON = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def decode_auth(data: bytes) -> str | None:
    """The key of an ``auth`` message; None for anything else."""
    try:
        return _auth.decode(data).api_key
    except _BAD_JSON:
        return None


@dataclass(frozen=True, slots=True)
class Malformed:
    """A frame that is no call; ``id`` is its id when that much could be read."""

    id: int | str | None
    error: RealmError


def decode_call(data: bytes) -> Envelope | Malformed:
    """Read a text frame. Never raises."""
    try:
        return _envelope.decode(data)
    except _BAD_JSON as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    try:
        found = _only_id.decode(data).id
    except _BAD_JSON:
        found = None
    return Malformed(found, RealmError("malformed_message", f"not a call: {reason}"))


def error_data(error: RealmError | ErrorInfo) -> dict[str, Any]:
    """The ``error`` object of a reply."""
    data: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.details:
        data["details"] = error.details
    if error.retry_after is not None:
        data["retry_after"] = error.retry_after
    return data


def guest_bytes(raw: msgspec.Raw, name: str, function: str) -> bytes:
    """What a guest gets for a parameter of any type: a text's UTF-8, or other JSON as it was written."""
    data = bytes(raw)
    if not data.startswith(b'"'):
        return data
    try:
        return msgspec.json.decode(data, type=str).encode()
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise invalid_params(name, str(error), function=function) from None


Outcome = Literal["complete", "error", "cancelled"]
