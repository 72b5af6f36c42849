"""Releases: a bundle and a collection made with it, loaded beside the collection that is served, and exchanged for it.

    releases/NAME/bundle/          what embeds
    releases/NAME/COLLECTION/      the same items in its space; follows the served collection, write by write

Of a collection one release is live and at most one stands by: a candidate, or what was live before. An exchange holds writes
back, replays the last of them, notes the new state in releases.json (the commit), and lets writes go on at the other side;
from then on the one that was live follows the other, so that rolling back is an exchange, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from export.bundle import Bundle, RefusalError
from export.machine import free_memory
from service.acceptance import Acceptance, Asked, accept
from service.collection import Collection
from service.errors import (
    NotFoundError,
    PreconditionError,
    ResourceError,
    ServiceError,
    UnavailableError,
)
from service.index import gently
from service.logs import LOG
from service.metrics import ReleaseSaid, gpu_memory
from service.model import Model
from service.reading import read_manifest
from service.reembed import EXAMPLES, Reembedding, check_lineage, survey
from service.served import Served
from service.servicer import Engine, as_refusal
from service.store import NAME, NAME_RULE, Pointer

# Writes that are replayed at a time: what a stop waits for.
STEP = 256
# Seconds between looks at what was written to the served collection.
EVERY = 0.2
# Writes that are held back for: so many, or as many as are replayed in so many seconds.
FEW, SECONDS = 64, 2.0
# How long an exchange waits for that.
PATIENCE = 120.0
# Bytes that an encoder takes for each of its graph's, and beside.
PER_BYTE, BESIDE = 2.5, 128 * 2**20

T = TypeVar("T")


class State(StrEnum):
    """How far a release is that stands by."""

    LOADING = "loading"
    CATCHING_UP = "catching_up"
    READY = "ready"
    FAILED = "failed"
    PREVIOUS = "previous"


@dataclass(eq=False)
class Standby:
    """A release beside the one that is served."""

    release: str
    was_live: bool
    state: State
    asked: Sequence[Asked] = ()
    min_overlap: float = 0.0
    space_id: str = ""
    """Space of its encoder, from before that is loaded on."""
    served: Served | None = None
    """Its collection, once it is loaded; nobody reads it yet, or some calls still do."""
    work: Reembedding | None = None
    """What keeps it in step; None while it need not be."""
    acceptance: Acceptance | None = None
    error: ServiceError | None = None
    """Why it failed."""
    task: asyncio.Task[None] | None = None
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "release"))
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Who replays writes."""
    stopping: threading.Event = field(default_factory=threading.Event)
    rate: float = 0.0
    """Writes that were replayed per second, lately."""


class Releases:
    """The releases of a server's collections. The event loop's own."""

    def __init__(self, engine: Engine, model_of: Callable[[Bundle], Model], folder: Path | None) -> None:
        """`model_of` loads a bundle; `folder` is that of the releases."""
        self._engine, self._model_of, self._folder = engine, model_of, folder
        self._standby: dict[str, Standby] = {}
        self._changing: dict[str, asyncio.Lock] = {}
        self._changes: set[asyncio.Task[Any]] = set()
        self._leaving: list[Standby] = []
        self._loading = asyncio.Lock()
        for collection in engine.store.all():
            previous = engine.store.pointer(collection.name).previous
            if previous is not None and not engine.store.follows:
                self._standby[collection.name] = Standby(previous, True, State.PREVIOUS)

    # --- what is asked ------------------------------------------------------------------------------------------

    def live(self, name: str) -> tuple[str, Served]:
        """The release that a collection is served from, and the collection. Raises `NotFoundError`."""
        served = self._engine.store.served(name)
        return self._engine.store.pointer(name).live, served

    def standby(self, name: str) -> Standby | None:
        """What stands beside it."""
        return self._standby.get(name)

    def names(self) -> list[str]:
        """Every collection."""
        return [collection.name for collection in self._engine.store.all()]

    def said(self) -> Iterable[ReleaseSaid]:
        """For the metrics: in another thread."""
        for collection in self._engine.store.all():
            name = collection.name
            yield ReleaseSaid(name, self._engine.store.pointer(name).live, collection.space_id, "live", 0)
            standby = self._standby.get(name)
            if standby is not None:
                space = "" if standby.served is None else standby.served.collection.space_id
                yield ReleaseSaid(name, standby.release, space, standby.state.value, self.lag(name, standby))

    def lag(self, name: str, standby: Standby) -> int:
        """Writes of the live collection that the other does not hold; 0 where that is not loaded."""
        if standby.served is None:
            return 0
        try:
            live, other = self._engine.store.get(name), standby.served.writer
            return live.latest() - other.followed if other.manifest.follows == live.uid else live.latest()
        except NotFoundError:  # deleted or closed meanwhile
            return 0

    def check_deletable(self, name: str) -> None:
        """Raises `PreconditionError` where a release stands beside a collection."""
        if name in self._standby:
            raise PreconditionError(
                f"the release {self._standby[name].release!r} stands beside the collection {name!r}: finish it first "
                "(FinishRelease)", "RELEASE_STANDS_BY",
            )  # fmt: skip

    # --- what is done -------------------------------------------------------------------------------------------

    async def prepare(self, name: str, release: str, asked: Sequence[Asked], min_overlap: float) -> None:
        """Load a release beside a collection, in the background. Raises `ServiceError`."""
        await self._whole(self._prepare(name, release, asked, min_overlap))

    async def switch(self, name: str, release: str, leave_out: bool) -> float:
        """Serve what stands by; how many seconds writes were held back. Raises `ServiceError`; then nothing changed."""
        return await self._whole(self._switch(name, release, leave_out))

    async def roll_back(self, name: str, leave_out: bool) -> float:
        """Serve what was served before, with what was written since. As `switch`."""
        return await self._whole(self._roll_back(name, leave_out))

    async def finish(self, name: str) -> None:
        """Unload what stands by, once no call uses it; its files stay. Raises `ServiceError`."""
        await self._whole(self._finish(name))

    async def stop(self) -> None:
        """End what is under way; it goes on when it is prepared again."""
        for standby in self._standby.values():
            standby.stopping.set()
            if standby.task is not None:
                standby.task.cancel()
        tasks = [standby.task for standby in self._standby.values() if standby.task is not None]
        await asyncio.gather(*tasks, *self._changes, return_exceptions=True)

    def close(self) -> None:
        """Close the collections that stand by; after `stop`."""
        for standby in [*self._standby.values(), *self._leaving]:
            standby.stopping.set()
            standby.thread.shutdown(wait=True, cancel_futures=True)
            if standby.served is not None:
                standby.served.collection.close()

    async def _whole(self, change: Coroutine[Any, Any, T]) -> T:
        """A change that has begun is finished even if its caller leaves."""
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        try:
            return await asyncio.shield(task)
        except RefusalError as e:
            raise _refusal(e) from e

    def _writer(self, name: str) -> Collection:
        """The collection that is served, to be written to. Raises `NotFoundError`, and `PreconditionError` where another
        process does that."""
        return self._engine.store.served(name).writer

    def _change(self, name: str) -> asyncio.Lock:
        """One change of a collection's releases at a time."""
        return self._changing.setdefault(name, asyncio.Lock())

    async def _prepare(self, name: str, release: str, asked: Sequence[Asked], min_overlap: float) -> None:
        live, _ = self.live(name)
        self._writer(name)
        if self._folder is None:
            raise PreconditionError(
                "this server has no folder of releases: start it with --releases FOLDER, where FOLDER/NAME/bundle is a "
                "bundle", "NO_RELEASES_FOLDER",
            )  # fmt: skip
        if not NAME.fullmatch(release):
            raise NotFoundError(f"{release[:80]!r} cannot be a release's name: {NAME_RULE}", "release", release[:80])
        if release == live:
            raise PreconditionError(
                f"the collection {name!r} is served from the release {release!r} already", "RELEASE_IS_LIVE"
            )
        async with self._change(name):
            before = self._standby.get(name)
            if before is not None and (before.release != release or before.state == State.PREVIOUS):
                if before.release == release:
                    return  # what was live before: it can be rolled back to
                raise PreconditionError(
                    f"the release {before.release!r} stands beside the collection {name!r} already: finish it first "
                    "(FinishRelease)", "RELEASE_STANDS_BY",
                )  # fmt: skip
            if before is not None and before.state != State.FAILED:
                return
            if not (self._folder / release / "bundle").is_dir():
                raise NotFoundError(
                    f"there is no bundle in the release {release!r}: put it into {release}/bundle in the server's folder of "
                    "releases", "release", release,
                )  # fmt: skip
            if before is not None:
                await self._unload(before)
            standby = Standby(release, before is not None and before.was_live, State.LOADING, asked, min_overlap)
            self._standby[name] = standby
            standby.task = asyncio.create_task(self._bring_up(name, standby))

    async def _switch(self, name: str, release: str, leave_out: bool) -> float:
        self._writer(name)
        async with self._change(name):
            standby = self._standby.get(name)
            if standby is None or standby.release != release:
                known = "nothing" if standby is None else f"the release {standby.release!r}"
                raise PreconditionError(
                    f"{known} stands beside the collection {name!r}: prepare {release!r} first", "RELEASE_NOT_READY"
                )
            return await self._exchange(name, standby, leave_out)

    async def _roll_back(self, name: str, leave_out: bool) -> float:
        self._writer(name)
        async with self._change(name):
            standby = self._standby.get(name)
            if standby is None or not standby.was_live:
                raise PreconditionError(
                    f"nothing that the collection {name!r} was served from before stands beside it",
                    "NOTHING_TO_ROLL_BACK",
                )
            return await self._exchange(name, standby, leave_out)

    async def _finish(self, name: str) -> None:
        async with self._change(name):
            standby = self._standby.get(name)
            if standby is None:
                self._writer(name)
                return
            with contextlib.suppress(NotFoundError):  # deleted meanwhile: nothing to note
                live, served = self.live(name)
                await self._engine.write(self._engine.store.point, name, Pointer(live=live))
                served.was_another = False
            del self._standby[name]
            await self._unload(standby)
        LOG.info("the release %r of %s is finished", standby.release, name, extra={"event": "release"})

    # --- how ----------------------------------------------------------------------------------------------------

    async def _bring_up(self, name: str, standby: Standby) -> None:
        """Load it, let it catch up, ask it, and keep it in step."""
        try:
            await self._load(name, standby)
            standby.state = State.CATCHING_UP
            while not await self._step(standby):
                pass
            await self._ask(name, standby)
            while not await self._step(standby):
                pass
            standby.state = State.READY
            LOG.info("the release %r of %s is ready", standby.release, name, extra={"event": "release"})
            while True:
                await asyncio.sleep(EVERY)
                while not await self._step(standby):
                    pass
        except asyncio.CancelledError:
            raise
        except Exception as e:  # whatever it is, what is served goes on
            standby.error = _refusal(e)
            standby.state = State.FAILED
            LOG.error("the release %r of %s failed: %s", standby.release, name, e, extra={"event": "release"})

    async def _load(self, name: str, standby: Standby) -> None:
        """Its encoder and its collection; and what lets that catch up. Raises `RefusalError` and `ServiceError`."""
        old, place = self._writer(name), self._engine.store.place(name, standby.release)
        async with self._loading:  # two at once might each find the memory that both need
            bundle = await self._run(standby, self._bundle, standby.release, place)
            if bundle.space_id == old.space_id:
                raise PreconditionError(
                    f"the release {standby.release!r} is of the served collection's space {old.space_id}: its vectors would "
                    "be the same; give its bundle at the next start instead", "SAME_SPACE",
                )  # fmt: skip
            on_gpu = not self._engine.encoder.runtime.provider.startswith(("CPU", "OpenVINO"))
            _check_memory(bundle, place, bundle.space_id in self._engine.models, on_gpu)
            standby.space_id = bundle.space_id  # so that its encoder is not freed before it is used
            model = self._engine.models.get(bundle.space_id)
            if model is None:
                model = await self._run(standby, self._model_of, bundle)
                model.pipeline.start()
                self._engine.models[bundle.space_id] = model
        await self._run(standby, _open, standby, place, old, bundle)
        await self._run(standby, _follow, standby, old, model)

    def _bundle(self, release: str, place: Path) -> Bundle:
        """That of a release; of what was not served from one, that of its space. Raises `RefusalError`."""
        if release:
            assert self._folder is not None
            return Bundle.open(self._folder / release / "bundle")
        space = read_manifest(place, None).space_id
        model = self._engine.models.get(space)
        if model is None:
            raise RefusalError(
                f"{place} is of space {space}, no encoder of it is loaded: give its bundle as --other-bundles"
            )
        return model.encoder.bundle

    async def _step(self, standby: Standby) -> bool:
        """Replay some writes; whether few are left, such as come all the time."""
        async with standby.turn:
            return await self._run(standby, _replay, standby) <= _few(standby)

    async def _ask(self, name: str, standby: Standby) -> None:
        """The acceptance queries."""
        assert standby.served is not None and standby.work is not None
        new, old = standby.served.writer, self._writer(name)
        async with standby.turn:
            await self._run(standby, gently, functools.partial(_tidy, standby.work))
            encoder = self._engine.models[new.space_id].encoder
            asking = functools.partial(accept, new, encoder, old, standby.asked, standby.min_overlap)
            standby.acceptance = await self._run(standby, asking)

    async def _exchange(self, name: str, standby: Standby, leave_out: bool) -> float:
        """Exchange what stands by and what is served. Raises `ServiceError`; then nothing changed."""
        if standby.state == State.PREVIOUS:
            await self._reload(name, standby)
        elif standby.state != State.READY:
            raise PreconditionError(
                f"the release {standby.release!r} of {name!r} is {standby.state.value}"
                + (f" ({standby.error})" if standby.error else "") + ": wait until it is ready", "RELEASE_NOT_READY",
            )  # fmt: skip
        elif standby.acceptance is not None and not standby.acceptance.passed:
            raise PreconditionError(
                f"the release {standby.release!r} of {name!r} did not pass its acceptance queries: "
                + "; ".join(standby.acceptance.problems), "NOT_ACCEPTED",
            )  # fmt: skip
        await self._nearly(name, standby)
        release, live = self.live(name)
        other, work = standby.served, standby.work
        assert other is not None and work is not None
        async with standby.turn:
            await self._run(standby, work.settle)
            _check_left_out(name, standby, leave_out)
            moved, start = False, time.monotonic()
            try:
                await live.hold()
                while await self._run(standby, _replay, standby):
                    pass
                await self._run(standby, work.settle)
                _check_left_out(name, standby, leave_out)
                # From here on the one that was live follows the other: what it does not hold is what comes now.
                old, new = live.writer, other.writer
                await self._run(standby, old.follow_from, new.uid, new.latest())
                pointer = Pointer(live=standby.release, previous=release)
                other.was_another = True
                other.release(moved=False)  # it may have been live before
                await self._engine.write(self._engine.store.point, name, pointer, other)
                moved = True
            finally:
                live.release(moved)
        held = time.monotonic() - start
        self._standby[name] = Standby(release, True, State.PREVIOUS, space_id=old.space_id, served=live)
        if standby.task is not None:
            standby.task.cancel()
        standby.thread.submit(work.close)
        standby.thread.shutdown(wait=False)
        LOG.info(
            "%s is served from the release %r, writes were held for %.3f s", name, standby.release, held,
            extra={"event": "release"},
        )  # fmt: skip
        return held

    async def _reload(self, name: str, standby: Standby) -> None:
        """What was live before, loaded if it is not, follows what is live now. Raises `RefusalError` and `ServiceError`."""
        if standby.served is None:
            await self._load(name, standby)
        elif standby.work is None:
            old, new = self._writer(name), standby.served.writer
            await self._run(standby, _follow, standby, old, self._engine.models[new.space_id])

    async def _nearly(self, name: str, standby: Standby) -> None:
        """Once few enough writes are left to hold the next ones back for. Raises `PreconditionError`."""
        until = time.monotonic() + PATIENCE
        while (lag := await self._run(standby, self.lag, name, standby)) > _few(standby):
            if standby.stopping.is_set():
                raise _stopped()
            if time.monotonic() > until:
                raise PreconditionError(
                    f"the release {standby.release!r} of {name!r} lags {lag:,} writes behind, and does not catch up while "
                    "so much is written: write less, or switch later", "RELEASE_LAGS", lag=lag,
                )  # fmt: skip
            await self._step(standby)

    async def _unload(self, standby: Standby) -> None:
        """Stop it, and close its collection and its encoder once nobody uses them."""
        self._leaving.append(standby)
        standby.stopping.set()
        if standby.task is not None:
            standby.task.cancel()
            await asyncio.gather(standby.task, return_exceptions=True)
        await self._run(standby, int)  # after what its thread still does
        served = standby.served
        if served is not None:
            await served.uses.ended()
            await self._run(standby, served.collection.close)
        standby.thread.shutdown(wait=False)
        self._leaving.remove(standby)
        await self._engine.free_models(each.space_id for each in self._standby.values() if each is not standby)

    async def _run(self, standby: Standby, call: Callable[..., T], *arguments: object) -> T:
        """In the standby's thread; it is finished even if the caller leaves."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(standby.thread, call, *arguments))


def _open(standby: Standby, place: Path, old: Collection, bundle: Bundle) -> None:
    """The release's collection; made where there is none. Raises `RefusalError`."""
    if (place / "collection.json").is_file():
        collection = Collection(place, bundle.space_id)
        try:
            check_lineage(old, collection)
        except RefusalError:
            collection.close()
            raise
    else:
        manifest = old.manifest
        collection = Collection.create(
            place, bundle.space_id, bundle.dim, manifest.policy, follows=old.uid, keep_originals=manifest.keep_originals,
            thumbnail_pixels=manifest.thumbnail_pixels,
        )  # fmt: skip
    standby.served = Served(collection, was_another=True)


def _follow(standby: Standby, old: Collection, model: Model) -> None:
    """Begin to replay the writes of `old`; first what was left out before, and can be embedded now. Raises
    `RefusalError`."""

    def check(_: object = None) -> None:
        if standby.stopping.is_set():
            raise _stopped()

    assert standby.served is not None
    new = standby.served.writer
    work = Reembedding(old, new, model.encoder, Console(quiet=True))
    again = survey(old, new, meet=check).again
    for low in range(0, len(again), STEP):
        check()
        work.put(again[low : low + STEP])
    standby.work = work


def _few(standby: Standby) -> float:
    """How many writes may be left to hold others back for."""
    return max(FEW, SECONDS * standby.rate)


def _replay(standby: Standby) -> int:
    """Replay some writes; how many are left."""
    work = standby.work
    assert work is not None
    before, start = work.new.followed, time.monotonic()
    if before < work.old.latest():
        work.step(STEP)
        standby.rate = (work.new.followed - before) / max(time.monotonic() - start, 1e-6)
    return work.lag


def _tidy(work: Reembedding) -> None:
    """What was embedded becomes segments with indexes, as few as can be where most of it is new."""
    work.new.flush()
    if 2 * work.embedded >= len(work.new):
        work.new.compact(everything=True)
    else:
        work.new.maintain()


def _stopped() -> UnavailableError:
    return UnavailableError("the release was given up, or the server is shutting down")


def left_out(standby: Standby) -> tuple[Counter[str], dict[str, list[str]]]:
    """How many items a release cannot hold, and examples of their keys, by reason."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for key, why in list(standby.work.left_out.items()) if standby.work is not None else ():
        reason = why.partition(": ")[0]
        counts[reason] += 1
        if counts[reason] <= EXAMPLES:
            examples.setdefault(reason, []).append(key)
    return counts, examples


def _check_left_out(name: str, standby: Standby, accepted: bool) -> None:
    """Raises `PreconditionError` where items would be lost."""
    counts, examples = left_out(standby)
    if counts and not accepted:
        reasons = ", ".join(f"{count:,} {reason} such as {examples[reason][0]!r}" for reason, count in counts.items())
        raise PreconditionError(
            f"{counts.total():,} items of {name!r} are not in the release {standby.release!r}, as they have no picture to "
            f"embed ({reasons}): they would not be found any more; accept that with leave_out", "ITEMS_LEFT_OUT",
            count=counts.total(),
        )  # fmt: skip


def _check_memory(bundle: Bundle, place: Path, is_loaded: bool, on_gpu: bool) -> None:
    """Raises `ResourceError` where a release does not fit the memory beside what is served."""
    graphs = 0 if is_loaded else max(path.stat().st_size for path in bundle.folder.glob("*.onnx"))
    index = sum(path.stat().st_size for path in place.glob("segments/*/index.faiss"))
    encoder = int(PER_BYTE * graphs) + (0 if is_loaded else BESIDE)
    places = [("memory", encoder + index, free_memory())]
    places += [("GPU memory", encoder, total - used) for used, total in gpu_memory()[:1] if on_gpu]
    for where, needed, free in places:
        if needed > free:
            raise ResourceError(
                f"the release needs about {needed / 2**20:,.0f} MiB of {where} beside what is served, "
                f"{free / 2**20:,.0f} MiB are free: finish another release, or give the machine more", needed_bytes=needed,
                free_bytes=free,
            )  # fmt: skip


def _refusal(error: Exception) -> ServiceError:
    """As the API says it."""
    if isinstance(error, RefusalError):
        return PreconditionError(str(error), "RELEASE_REFUSED")
    return as_refusal("ReleaseService", error)
