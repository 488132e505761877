"""Run one guest in this process, without a server: the same runtime and the same engine.

For trying a guest while writing it. There is no client behind it, so ``recv`` gives CLOSED at once,
and the key-value store starts empty and ends with the run.
"""

from __future__ import annotations

import hashlib
import secrets
import select
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE
from realm.adapters.peft import check_adapter, parse_config
from realm.engine.core import EngineCore
from realm.engine.loading import EngineOptions, load_engine
from realm.errors import RealmError
from realm.guests.abi import ErrorCode
from realm.guests.compiler import compile_module_sync
from realm.guests.facts import ModelFacts
from realm.guests.runtime import GuestRuntime
from realm.limits import LIMITS
from realm.messages import AdapterFile, EngineReply
from realm.models.tokenizer import Tokenizer
from realm.run_messages import (
    Credit,
    Log,
    Output,
    RunFinished,
    RunLimits,
    StartRun,
    StoreGet,
    StoreReply,
    StoreSet,
    TenantShare,
    WorkerEvent,
)
from realm.settings import default_home

LOCAL_TENANT = "local"
_WORKER = 1
_RUN = 1
_CREDIT = 1 << 20


def run_local(
    wasm: Path,
    input: bytes,
    model: Path,
    *,
    cache: Path | None = None,
    seed: int | None = None,
    limits: RunLimits | None = None,
    options: EngineOptions | None = None,
    engine: EngineCore | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> Iterator[Output | Log | RunFinished]:
    """Run a guest and give its events; the last one is :class:`~realm.run_messages.RunFinished`.

    Args:
        wasm: the module. model: the model's folder.
        cache: folder for compiled modules; the home's own when None.
        seed: of all draws of the run; chosen at random when None.
        options: how to load the engine; ``engine`` is one that is loaded already.
        adapters: PEFT folders, by the names that the guest gives them in ``lora_apply``.

    Closing the iterator ends the run.

    Raises:
        RealmError: ``module_*`` or ``compile_limit`` for the module, ``model_*`` for the model,
            ``adapter_invalid`` for an adapter.
    """
    module = compile_module_sync(wasm, cache or default_home() / "cache")
    tokenizer = Tokenizer(model)
    facts = ModelFacts.load(model, bos=tokenizer.bos, eos=tokenizer.eos)
    core = engine or load_engine(model, options)
    for name, folder in (adapters or {}).items():
        _add_adapter(core, name, folder)
    runtime = GuestRuntime(_WORKER, tokenizer, facts)
    start = StartRun(
        run=_RUN,
        tenant=LOCAL_TENANT,
        module=wasm.stem,
        artifact=str(module.artifact),
        input=input,
        seed=secrets.randbits(64) if seed is None else seed,
        limits=limits or RunLimits(),
        credit=_CREDIT,
        artifact_sha256=module.artifact_sha256,
    )
    # Nobody shares this processor: the rate that slows a tenant down on a server does not count.
    runtime.share(TenantShare(LOCAL_TENANT, float(LIMITS["fuel_per_second"].default) * 1000))
    runtime.start(start)
    runtime.close_input(_RUN)
    try:
        yield from _drive(runtime, core)
    finally:
        # At once, without a last slice: the caller has gone.
        runtime.close()
        core.submit(_WORKER, runtime.turn(time.monotonic()).ops)
        if engine is None:
            core.close()


def _add_adapter(core: EngineCore, name: str, folder: Path) -> None:
    """Check a PEFT folder and let the engine know it under a name."""
    file = folder / TENSORS_FILE
    try:
        raw = (folder / CONFIG_FILE).read_bytes()
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        message = f"the adapter {name!r} cannot be read: {error.filename}: {error.strerror}"
        whole = f"a PEFT folder has {CONFIG_FILE} and {TENSORS_FILE}"
        raise RealmError("adapter_invalid", f"{message}; {whole}", details={"file": error.filename}) from error
    try:
        check_adapter(file, parse_config(raw), core.config)
    except RealmError as error:
        raise RealmError(error.code, f"the adapter {name!r}: {error.message}", details=error.details) from error
    core.adapters.register(AdapterFile(LOCAL_TENANT, name, str(file), sha256, raw))


def _drive(runtime: GuestRuntime, core: EngineCore) -> Iterator[Output | Log | RunFinished]:
    store: dict[str, bytes] = {}
    replies = 0
    # One step for the guest's call and, on a device that may run ahead, one for its next.
    most = 2 if core.run_ahead else 1
    while True:
        turn = runtime.turn(time.monotonic())
        core.submit(_WORKER, turn.ops, turn.continues)
        core.advance()
        for event in turn.events:
            if isinstance(event, StoreGet | StoreSet):
                runtime.store_reply(_answer_store(store, event))
                continue
            yield event
            if isinstance(event, RunFinished):
                return
            if isinstance(event, Output):
                runtime.credit(Credit(_RUN, len(event.data)))
        if core.has_work():
            replies += 1
            while core.in_flight < most and core.launch():
                pass
            core.settle(wait=True)
            runtime.deliver(EngineReply(replies, *core.take().get(_WORKER, ([], b""))))
        elif core.adapters.waiting:
            select.select([core.adapters.fileno()], [], [])
        elif not turn.busy and not turn.events:
            _sleep_until(turn.deadline)


def _sleep_until(deadline: float | None) -> None:
    if deadline is None:
        raise RealmError("internal", "the guest waits for something that will never come")
    time.sleep(max(0.0, deadline - time.monotonic()))


def _answer_store(store: dict[str, bytes], event: WorkerEvent) -> StoreReply:
    if isinstance(event, StoreGet):
        value = store.get(event.key)
        if value is None:
            return StoreReply(event.call, int(ErrorCode.NOT_FOUND), message=f"no key {event.key!r}")
        return StoreReply(event.call, 0, value)
    assert isinstance(event, StoreSet)
    if event.value:
        store[event.key] = event.value
    else:
        store.pop(event.key, None)
    return StoreReply(event.call, 0)
