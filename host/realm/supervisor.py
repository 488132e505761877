"""Keeps the host's child processes: the engine and the guest workers.

Children get no environment but what they need, no descriptors but their own, and talk to the host
only over sockets in a folder of mode 0700. They end by themselves when the host's end of those
closes, so none outlives it, however it ends.

Dead ones are replaced, and so is a worker that does not answer any more. A worker in reserve has
everything loaded and only waits to be told: it takes a dead one's place within milliseconds, where
starting one takes a third of a second on an idle machine, and longer while the engine computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm.child import Child, how_it_ended
from realm.engine.environment import THREADS
from realm.errors import RealmError
from realm.gateway.gateway import Gateway
from realm.gateway.links import EngineClient
from realm.run_messages import Ping
from realm.settings import ServeSettings

log = logging.getLogger("realm.serve")

ENGINE_MODULE = "realm.engine.server"
WORKER_MODULE = "realm.guests.worker"
# A worker computes little: threads of BLAS would only cost memory, and Landlock does not bind them.
WORKER_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}
_END_SECONDS = 5.0
_RESTART_FIRST, _RESTART_MOST = 0.1, 10.0
_HEALTHY_SECONDS = 30.0
"""An engine that lived this long is restarted at once; others after a wait that doubles."""
_EARLY_SECONDS = 2.0
_EARLY_DEATHS = 3
"""A start fails when this many workers ended within as many seconds: the next would do the same."""
_NEWS_SECONDS = 1.0
"""How long the news of a lost engine may take to come after the end of a worker that knew it."""
_JOIN_SECONDS = 60.0
"""How long a worker may take to start before it counts as hanging."""
PING_SECONDS = 2.0
PINGS_MISSED = 5
"""A worker that has said nothing for as many rounds of pings is killed: after 10 to 12 seconds."""


def engine_arguments(settings: ServeSettings, socket: Path, model: Path) -> list[str]:
    """Arguments of the engine process, which will listen on ``socket`` and serve the folder ``model``."""
    return ["--socket", str(socket), "--model", str(model), *settings.engine.arguments()]


def engine_environment(settings: ServeSettings) -> dict[str, str]:
    """Defaults of the engine's environment variables.

    Triton keeps compiled kernels where only this user can write, whatever the user's home folder is.
    """
    return {**THREADS, "TRITON_CACHE_DIR": str(settings.home / "triton")}


def worker_arguments(settings: ServeSettings, number: int, engine: Path, gateway: Path, model: Path) -> list[str]:
    """Arguments of guest worker ``number``; ``engine`` and ``gateway`` are the sockets that it connects to."""
    links = ["--engine", str(engine), "--gateway", str(gateway)]
    return [*links, "--model", str(model), "--cache", str(settings.home / "cache"), "--worker", str(number)]


def early_wait(deaths: int) -> float:
    """Seconds to wait before a worker is replaced, after so many in a row that did not live long.

    One may be an accident. More would be the same again, at the price of a start each.
    """
    return min(_RESTART_FIRST * 2.0**deaths, _RESTART_MOST) if deaths > 1 else 0.0


@dataclass(slots=True, eq=False)
class _Worker:
    """A worker process. ``engine`` is the socket of the engine that it belongs to."""

    number: int
    child: Child
    engine: Path
    heard: int = -1
    missed: int = 0


class Supervisor:
    """Keeps one engine and ``settings.workers`` workers alive for a gateway."""

    def __init__(self, settings: ServeSettings, gateway: Gateway, model: Path, sockets: Path) -> None:
        self._settings = settings
        self._gateway = gateway
        self._model = model
        self._sockets = sockets
        self._engine: Child | None = None
        self._engine_path: Path | None = None
        self._workers: dict[int, _Worker] = {}
        self._reserve: _Worker | None = None
        self._client: EngineClient | None = None
        self._next_worker = 1
        self._early_deaths = 0
        self._generation = 0
        self._ready = asyncio.Event()
        self._filling = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.worker_socket = sockets / "gateway"

    async def start(self) -> None:
        """Start everything; returns when runs can start.

        Raises:
            RealmError: ``engine_start`` if the engine or the workers do not come up.
        """
        self._gateway.on_worker_lost = self._link_closed
        client = await self._start_engine()
        self._background(self._keep_engine(client), "keep the engine")
        await self._wait_for_workers()
        self._background(self._watch_workers(), "watch the workers")
        self._keep_reserve()

    async def stop(self) -> None:
        """End all children within five seconds."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._gateway.close()
        if self._gateway.engine is not None:
            self._gateway.engine.close()
        if self._reserve is not None:
            self._reserve.child.terminate()
        if self._engine is not None and not self._ready.is_set():
            # It is loading its model and reads no sockets.
            self._engine.terminate()
        await asyncio.gather(*(child.end(_END_SECONDS) for child in self._children()))

    def _children(self) -> list[Child]:
        workers = [*self._workers.values(), *([self._reserve] if self._reserve else [])]
        return [*(worker.child for worker in workers), *([self._engine] if self._engine else [])]

    def _background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- engine ---------------------------------------------------------------------------------

    async def _start_engine(self) -> EngineClient:
        settings = self._settings
        self._generation += 1
        self._ready.clear()
        self._engine_path = path = self._sockets / f"engine{self._generation}"
        self._engine = child = await Child.spawn(
            "engine",
            ENGINE_MODULE,
            *engine_arguments(settings, path, self._model),
            environment=engine_environment(settings),
        )
        self._client = client = EngineClient()
        exited = asyncio.create_task(child.wait(), name="the engine's exit")
        try:
            async with asyncio.timeout(settings.ready_seconds):
                while not exited.done():
                    try:
                        await client.connect(str(path), os.getpid())
                        break
                    except (FileNotFoundError, ConnectionRefusedError):
                        await asyncio.sleep(0.02)
                await self._fill(path, reserve=False)
                waiting: set[asyncio.Future[Any]] = {exited, client.ready}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            child.terminate()
            raise RealmError(
                "engine_start", f"the engine was not ready in {settings.ready_seconds:g} seconds"
            ) from None
        finally:
            if not exited.done():
                exited.cancel()
        if not client.ready.done() or client.ready.cancelled():
            raise RealmError("engine_start", "the engine ended while it started: its output above says why")
        ready = client.ready.result()
        log.info("the engine serves %s, %d KV pages of %d", ready.model, ready.pages, ready.page_size)
        self._gateway.engine_ready(client)
        self._ready.set()
        return client

    async def _keep_engine(self, client: EngineClient) -> None:
        """Replace the engine, and with it the workers, whenever it is lost."""
        wait = _RESTART_FIRST
        while True:
            await client.lost.wait()
            self._gateway.engine_lost()
            lived = time.monotonic() - self._engine.began if self._engine else 0.0
            log.error("the engine is lost after %.1f seconds; restarting it", lived)
            self._ready.clear()
            client.close()
            await self._end_generation()
            wait = _RESTART_FIRST if lived > _HEALTHY_SECONDS else min(wait * 2, _RESTART_MOST)
            while True:
                await asyncio.sleep(wait)
                try:
                    client = await self._start_engine()
                    self._keep_reserve()
                    break
                except RealmError as error:
                    log.error("%s", error)
                    await self._end_generation()
                    wait = min(wait * 2, _RESTART_MOST)

    async def _end_generation(self) -> None:
        """Workers end with their engine's socket; make sure of them, and of an engine that hangs."""
        children = self._children()
        self._workers.clear()
        self._engine = self._reserve = self._engine_path = None
        for child in children:
            child.terminate()
        await asyncio.gather(*(child.end(_END_SECONDS) for child in children))

    # --- workers --------------------------------------------------------------------------------

    def _keep_reserve(self) -> None:
        if self._engine_path is not None:
            self._background(self._fill(self._engine_path), "fill the reserve")

    async def _fill(self, engine: Path, *, reserve: bool = True) -> None:
        """Have as many workers serve as there should be, and one more wait, as long as ``engine`` is the engine."""
        async with self._filling:
            while engine == self._engine_path and len(self._workers) < self._settings.workers:
                worker, self._reserve = self._reserve, None
                if worker is None or not worker.child.alive:
                    worker = await self._spawn_worker(engine)
                if worker is not None:
                    self._workers[worker.number] = worker
                    worker.child.go()
            if reserve and engine == self._engine_path and self._reserve is None:
                self._reserve = await self._spawn_worker(engine)

    async def _spawn_worker(self, engine: Path) -> _Worker | None:
        """A worker that loads everything and then waits. None if the engine was lost meanwhile."""
        number = self._next_worker
        self._next_worker += 1
        child = await Child.spawn(
            f"worker {number}",
            WORKER_MODULE,
            *worker_arguments(self._settings, number, engine, self.worker_socket, self._model),
            "--standby",
            environment=WORKER_ENVIRONMENT,
            waits=True,
        )
        worker = _Worker(number, child, engine)
        self._background(self._keep_worker(worker), f"keep worker {number}")
        if engine == self._engine_path:
            return worker
        child.terminate()
        return None

    async def _keep_worker(self, worker: _Worker) -> None:
        """Replace one worker when it ends, unless its whole generation does."""
        status = await worker.child.wait()
        lived = time.monotonic() - worker.child.began
        if status == 0 and self._client is not None:
            # It saw a link close. Where that was the engine's, no other worker could do better.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._client.lost.wait(), _NEWS_SECONDS)
        if worker.engine != self._engine_path or (self._client is not None and self._client.lost.is_set()):
            return
        if self._reserve is worker:
            self._reserve = None
        elif self._workers.get(worker.number) is worker:
            del self._workers[worker.number]
        log.error("worker %d %s after %.1f seconds; replacing it", worker.number, how_it_ended(status), lived)
        if lived < _EARLY_SECONDS:
            self._early_deaths += 1
            self._gateway.worker_joined.set()
        else:
            self._early_deaths = 0
        await asyncio.sleep(early_wait(self._early_deaths))
        await self._fill(worker.engine)

    def _link_closed(self, number: int) -> None:
        """A worker without a link to the gateway is of no use, even if it lives."""
        worker = self._workers.get(number)
        if worker is not None:
            self._background(worker.child.end(_END_SECONDS), f"end worker {number}")

    async def _watch_workers(self) -> None:
        """Kill workers that do not answer: stopped, or stuck where no time-out of theirs reaches.

        Rounds are counted, not seconds: a host that was itself held up hears all answers in its next
        round. A worker that has anything to say need not answer.
        """
        while True:
            await asyncio.sleep(PING_SECONDS)
            for number, worker in list(self._workers.items()):
                link = self._gateway.runs.workers.get(number)
                if link is None:
                    if time.monotonic() - worker.child.began > _JOIN_SECONDS:
                        log.error("worker %d has not come up in %g seconds; killing it", number, _JOIN_SECONDS)
                        worker.child.kill()
                    continue
                worker.missed = worker.missed + 1 if link.heard == worker.heard else 0
                worker.heard = link.heard
                if worker.missed >= PINGS_MISSED:
                    log.error("worker %d has not answered %d pings; killing it", number, worker.missed)
                    worker.child.kill()
                else:
                    link.send(Ping())

    async def _wait_for_workers(self) -> None:
        deadline = time.monotonic() + 60.0
        while len(self._gateway.runs.workers) < self._settings.workers:
            if time.monotonic() > deadline or self._early_deaths >= _EARLY_DEATHS:
                raise RealmError("engine_start", "the guest workers did not come up: their output above says why")
            self._gateway.worker_joined.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gateway.worker_joined.wait(), 1.0)
