"""What each function of the protocol does.

A handler gets the connection, the call and its checked parameters. It returns the data of the
``complete`` reply; or a coroutine that gives it (then the call has a task); or None when a run's
sink replies.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from realm import __version__
from realm.errors import RealmError
from realm.gateway import protocol as p
from realm.gateway.adapter_calls import AdapterCalls
from realm.gateway.calls import Call, GenerateSink, RunSink
from realm.gateway.run import Run, parse_run
from realm.gateway.tenants import set_limits, show_limits
from realm.gateway.uploads import Uploads, check_hash
from realm.limits import over_limit
from realm.registry.blobs import hash_and_sync
from realm.registry.database import Database
from realm.registry.records import ModuleRecord, Principal

if TYPE_CHECKING:
    from realm.gateway.gateway import Gateway

T = TypeVar("T")
GENERATE = "generate"
"""Name of the built-in module; tenants cannot take it."""

_LIST_BYTES = 1 << 20
_RUNNING_BYTES = 512
"""About how much ``ps`` lists, as JSON; what a run in progress takes of it."""

Result = dict[str, Any] | Coroutine[Any, Any, dict[str, Any] | None] | None


class Caller:
    """The part of a connection that functions see."""

    __slots__ = ("calls", "principal", "uploads")

    def __init__(self, principal: Principal, uploads: Uploads) -> None:
        self.principal = principal
        self.uploads = uploads
        self.calls: dict[int | str, Call] = {}

    @property
    def scope(self) -> str | None:
        """The tenant whose things are visible; None is all."""
        return None if self.principal.admin else self.principal.tenant


Handler = Callable[[Caller, Call, Any], Result]


class Functions:
    """All handlers, by the functions' names."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        # It never changes and takes 2 ms to encode: as long as a hundred calls.
        self._described = msgspec.Raw(p.encode([function.describe() for function in p.FUNCTIONS.values()]))
        self.handlers: dict[str, Handler] = {
            "generate": self.generate,
            "run": self.run,
            "send": self.send,
            "cancel": self.cancel,
            "ps": self.ps,
            "logs": self.logs,
            "modules.begin": self.modules_begin,
            "modules.commit": self.modules_commit,
            "modules.abort": self.modules_abort,
            "modules.list": self.modules_list,
            "modules.remove": self.modules_remove,
            **AdapterCalls(gateway).handlers,
            "models.list": self.models_list,
            "health": self.health,
            "metadata": self.metadata,
            "tenants.add": self.tenants_add,
            "tenants.list": self.tenants_list,
            "tenants.show": self.tenants_show,
            "tenants.set": self.tenants_set,
            "keys.add": self.keys_add,
            "keys.list": self.keys_list,
            "keys.revoke": self.keys_revoke,
        }
        if self.handlers.keys() != p.FUNCTIONS.keys():
            raise AssertionError("handlers and protocol disagree")

    # --- runs -----------------------------------------------------------------------------------

    def generate(self, caller: Caller, call: Call, params: p.GenerateParams) -> Result:
        gateway = self._gateway
        if (params.prompt is None) == (params.messages is None):
            raise p.invalid_params("prompt", "give exactly one of prompt and messages", function="generate")
        if params.messages is not None and not params.messages:
            raise p.invalid_params("messages", "give at least one message", function="generate")
        gateway.check_model(params.model)
        given: dict[str, Any] = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "stop": params.stop or [],
        }
        if params.messages is not None:
            given["messages"] = params.messages
        else:
            given["prompt"] = params.prompt
        if params.adapter is not None:
            gateway.adapters.book.check_usable(caller.principal.tenant, params.adapter)
            given["adapter"] = params.adapter
        seed = _seed(params.seed, "generate")
        sink = GenerateSink(call, streamed=bool(params.stream))
        return self._start(caller, call, GENERATE, p.encode(given), seed, sink)

    def run(self, caller: Caller, call: Call, params: p.RunParams) -> Result:
        data = p.guest_bytes(params.input, "input", "run")
        sink = RunSink(call, streamed=bool(params.stream))
        return self._start(caller, call, params.module, data, _seed(params.seed, "run"), sink)

    def _start(
        self, caller: Caller, call: Call, module: str, data: bytes, seed: int, sink: RunSink | GenerateSink
    ) -> Result:
        gateway = self._gateway
        tenant = caller.principal.tenant
        sha256 = gateway.known_module(tenant, module)
        compiled = gateway.artifacts.known(sha256) if sha256 is not None else None
        if compiled is not None:
            gateway.start_run(tenant, module, compiled, data, seed, sink)
            return None
        return self._prepare_and_start(tenant, module, data, seed, sink)

    async def _prepare_and_start(
        self, tenant: str, module: str, data: bytes, seed: int, sink: RunSink | GenerateSink
    ) -> None:
        gateway = self._gateway
        # Calls that wait for a compiler keep their input here, so they count as runs that wait.
        with gateway.runs.preparing(tenant, len(data)):
            compiled = await gateway.prepare_module(tenant, module)
        gateway.start_run(tenant, module, compiled, data, seed, sink)

    def send(self, caller: Caller, call: Call, params: p.SendParams) -> Result:
        run = self._find(caller, params.run)
        self._gateway.runs.message(run, p.guest_bytes(params.data, "data", "send"))
        return {}

    def cancel(self, caller: Caller, call: Call, params: p.CancelParams) -> Result:
        if (params.run is None) == (params.id is None):
            raise p.invalid_params("run", "give exactly one of run and id", function="cancel")
        runs = self._gateway.runs
        if params.run is not None:
            run = runs.find(params.run, caller.scope)
            return {"cancelled": run is not None and runs.cancel(run, "cancelled by the client")}
        target = caller.calls.get(cast("int | str", params.id))
        if target is None or target is call or target.done:
            return {"cancelled": False}
        if target.run is not None:
            return {"cancelled": runs.cancel(target.run, "cancelled by the client")}
        return {"cancelled": target.task is not None and target.task.cancel()}

    def _find(self, caller: Caller, run_id: str) -> Run:
        run = self._gateway.runs.find(run_id, caller.scope)
        if run is None:
            raise RealmError("run_not_found", f"no run {run_id} is in progress", details={"run": run_id})
        return run

    async def ps(self, caller: Caller, call: Call, params: p.PsParams) -> dict[str, Any]:
        gateway = self._gateway
        limit = params.limit or 50
        now = time.monotonic()
        scope = caller.scope
        listed: list[dict[str, Any]] = []
        more = False
        for run in itertools.islice(gateway.runs.of(scope), limit):
            listed.append({**run.describe(now), "tenant": run.tenant})
        if params.all and len(listed) < limit:
            rest, size = limit - len(listed), max(0, _LIST_BYTES - _RUNNING_BYTES * len(listed))
            records, more = await gateway.registry.run(
                lambda database: database.page_runs(scope, rest, size), tenant=scope
            )
            for record in records:
                entry: dict[str, Any] = {
                    "run": f"r{record.number}",
                    "module": record.module,
                    "status": record.status,
                    "started": record.started,
                    "seconds": (record.finished or record.started) - record.started,
                    "usage": record.usage or {},
                    "tenant": record.tenant,
                }
                if record.error is not None:
                    entry["error"] = record.error
                listed.append(entry)
        data = {"runs": listed, "engine": await gateway.engine_data(scope)}
        return {**data, "more": True} if more else data

    def logs(self, caller: Caller, call: Call, params: p.LogsParams) -> Result:
        run = self._gateway.runs.find(params.run, caller.scope)
        if run is not None:
            return {"run": params.run, "lines": list(run.log)}
        return self._finished_logs(caller.scope, params.run)

    async def _finished_logs(self, scope: str | None, run_id: str) -> dict[str, Any]:
        number = parse_run(run_id)
        lines, error = await self._gateway.registry.run(lambda database: database.run_log(scope, number), tenant=scope)
        return {"run": run_id, "lines": lines, **({} if error is None else {"error": error})}

    # --- modules --------------------------------------------------------------------------------

    async def modules_begin(self, caller: Caller, call: Call, params: p.BeginParams) -> dict[str, Any]:
        if params.name == GENERATE:
            raise p.invalid_params("name", f"{GENERATE!r} is the host's own", function="modules.begin")
        tenant, sha256, size = caller.principal.tenant, params.sha256, params.size
        limits = self._gateway.quotas.of(tenant).limits
        if size > limits.module_bytes:
            text = f"a module of {size:,} bytes is too large"
            raise over_limit("module_bytes", limits.module_bytes, size, text, code="module_too_large")
        known = await self._gateway.registry.run(
            lambda database: database.check_stored(tenant, sha256, size, limits), tenant=tenant
        )
        # A wrong size beside a known hash is let through to the upload, where it fails like any other.
        upload = caller.uploads.begin(params.name, size, sha256, stored=known == size)
        return {"upload": upload.number, "received": upload.received, "exists": upload.stored}

    async def modules_commit(self, caller: Caller, call: Call, params: p.UploadParams) -> dict[str, Any]:
        gateway = self._gateway
        tenant = caller.principal.tenant
        upload, file = caller.uploads.take(params.upload)
        try:
            sha256 = upload.sha256
            if file is None:
                file = await gateway.registry.run(
                    lambda database: database.borrow_content(tenant, sha256), tenant=tenant
                )
            check_hash(await asyncio.to_thread(hash_and_sync, file), sha256)
            compiled = await gateway.artifacts.make(sha256, file, tenant)
            imports = list(compiled.imports)
            record = await gateway.commit_module(tenant, upload.name, file, sha256, upload.size, imports)
        finally:
            caller.uploads.end(params.upload)
            if file is not None:
                file.unlink(missing_ok=True)
        return {**_module_data(record), "imports": imports}

    def modules_abort(self, caller: Caller, call: Call, params: p.UploadParams) -> Result:
        caller.uploads.abort(params.upload)
        return {}

    async def modules_list(self, caller: Caller, call: Call, params: p.NoParams) -> dict[str, Any]:
        tenant = caller.principal.tenant
        records = await self._gateway.registry.run(lambda database: database.list_modules(tenant), tenant=tenant)
        return {"modules": [{**_module_data(record), "created": record.created} for record in records]}

    async def modules_remove(self, caller: Caller, call: Call, params: p.NameParams) -> dict[str, Any]:
        await self._gateway.remove_module(caller.principal.tenant, params.name)
        return {}

    # --- the host -------------------------------------------------------------------------------

    async def models_list(self, caller: Caller, call: Call, params: p.NoParams) -> dict[str, Any]:
        return {"models": await self._gateway.models.get()}

    async def health(self, caller: Caller, call: Call, params: p.NoParams) -> dict[str, Any]:
        gateway = self._gateway
        return {
            "status": gateway.status,
            "model": gateway.model,
            "version": __version__,
            "uptime_seconds": time.monotonic() - gateway.began,
            "workers": len(gateway.runs.workers),
            "engine": await gateway.engine_data(caller.scope),
        }

    def metadata(self, caller: Caller, call: Call, params: p.NoParams) -> Result:
        return {
            "version": __version__,
            "protocol": p.PROTOCOL,
            "functions": self._described,
        }

    # --- administration -------------------------------------------------------------------------

    def _own(self, caller: Caller, work: Callable[[Database], T]) -> asyncio.Future[T]:
        """An operation that has its turn as the caller's own, whatever other tenants have queued."""
        return self._gateway.registry.run(work, tenant=caller.principal.tenant)

    async def tenants_add(self, caller: Caller, call: Call, params: p.AddTenantParams) -> dict[str, Any]:
        await self._own(caller, lambda database: database.add_tenant(params.name))
        return {"name": params.name}

    async def tenants_list(self, caller: Caller, call: Call, params: p.NoParams) -> dict[str, Any]:
        return {"tenants": await self._own(caller, lambda database: database.list_tenants())}

    async def tenants_show(self, caller: Caller, call: Call, params: p.ShowTenantParams) -> dict[str, Any]:
        if caller.scope not in (None, params.name):
            raise RealmError(
                "forbidden", "a tenant's key shows this tenant only; others need a key of the admin tenant"
            )
        return await show_limits(self._gateway, params.name)

    async def tenants_set(self, caller: Caller, call: Call, params: p.SetLimitsParams) -> dict[str, Any]:
        await set_limits(self._gateway, params.name, params.limits)
        return await show_limits(self._gateway, params.name)

    async def keys_add(self, caller: Caller, call: Call, params: p.AddKeyParams) -> dict[str, Any]:
        key = await self._own(caller, lambda database: database.add_key(params.tenant))
        return msgspec.structs.asdict(key)

    async def keys_list(self, caller: Caller, call: Call, params: p.ListKeysParams) -> dict[str, Any]:
        return {"keys": await self._own(caller, lambda database: database.list_keys(params.tenant))}

    async def keys_revoke(self, caller: Caller, call: Call, params: p.RevokeParams) -> dict[str, Any]:
        await self._own(caller, lambda database: database.revoke_key(params.id))
        self._gateway.drop_key(params.id)
        return {}


def _seed(seed: int | None, function: str) -> int:
    if seed is None:
        return secrets.randbits(64)
    if seed > p.MAX_SEED:
        raise p.invalid_params("seed", "more than 64 bits", function=function)
    return seed


def _module_data(record: ModuleRecord) -> dict[str, Any]:
    return {"name": record.name, "sha256": record.sha256, "size": record.size, "version": record.version}
