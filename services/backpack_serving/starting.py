"""Wait, at a start, for dependencies that aren't there yet, and log every few seconds what is missing and why.

A start waits at most `start_wait`, and never in a thread that keeps the process from ending.
"""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog
from backpack_lm.manifest import HELD_OUT, TOKENIZER, TOPICS, Manifest

from backpack_serving.errors import ServiceError, Unavailable
from backpack_serving.settings import Settings

T = TypeVar("T")

log = structlog.get_logger(__name__)

LOG_INTERVAL = 5.0
"""Seconds between two log lines of a wait."""

SILENT_SECONDS = 3.0
"""Seconds before the first log line."""

PAUSE = 1.0
"""Seconds between an attempt that failed and the next one."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.ckpt")


class ModelNotThere(FileNotFoundError):
    """The model's folder is empty or not complete yet, as while a volume is being filled."""


def can_judge(settings: Settings) -> bool:
    """Whether releases are judged before channels move to them: by BACKPACK_DEGRADATION, and the model has the text."""
    return not math.isinf(settings.degradation) and (settings.model / HELD_OUT).exists()


async def blocking(work: Callable[[], T], discard: Callable[[T], object] | None = None) -> T:
    """Run what blocks in a daemon thread. `asyncio.to_thread` would keep a process that ends until it returns.

    `discard` gets a result that nobody waits for any more.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            if error is None and discard is not None:
                threading.Thread(target=discard, args=(result,), daemon=True).start()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with suppress(RuntimeError):  # the loop was closed: the process ends
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="start", daemon=True).start()
    return await future


async def wait_for(
    what: str,
    attempt: Callable[[], Awaitable[T]],
    seconds: float,
    passing: tuple[type[Exception], ...] = (),
    why: Callable[[], str] = lambda: "no answer yet",
) -> T:
    """The result of the first attempt that succeeds, within so many seconds; 0 is one attempt.

    An error may pass if it is a ServiceError with `retry_after`, or one of `passing`; any other is raised at once.
    `why` says why an attempt lasts. When the time is over, raises the last error, or Unavailable if there is none.
    """
    loop = asyncio.get_running_loop()
    began = loop.time()
    until, next_line = began + seconds, began + SILENT_SECONDS
    gives_up = until if seconds else math.inf  # with an attempt that lasts
    last: Exception | None = None
    logged = ""
    running: asyncio.Future[T] = asyncio.ensure_future(attempt())
    try:
        while True:
            wake = max(0.0, min(gives_up, next_line) - loop.time())
            done, _ = await asyncio.wait({running}, timeout=wake)
            if done and (last := running.exception()) is None:  # type: ignore[assignment]
                if logged:
                    log.warning(f"{what} is there", waited=round(loop.time() - began, 1))
                return running.result()
            if last is not None and not _may_pass(last, passing):
                raise last
            now, reason = loop.time(), _text(last) if last is not None else why()
            if now >= (until if done else gives_up):
                raise last or Unavailable(
                    "NOT_READY",
                    f"{what}: {reason} after {seconds:g} s; BACKPACK_START_WAIT sets how long a start waits",
                )
            if now >= next_line or (done and reason != logged):
                waited = round(now - began, 1)
                log.warning(f"waiting for {what}", reason=reason, waited=waited, at_most=seconds)
                logged, next_line = reason, now + LOG_INTERVAL
            if done:
                await asyncio.sleep(min(PAUSE, max(0.0, until - now)))
                running = asyncio.ensure_future(attempt())
    finally:
        running.cancel()


def _may_pass(error: Exception, passing: tuple[type[Exception], ...]) -> bool:
    return isinstance(error, passing) or (isinstance(error, ServiceError) and error.retry_after is not None)


def _text(error: Exception) -> str:
    why = error.why if isinstance(error, ServiceError) else ""
    return " ".join(f"{error}{': ' if why else ''}{why}".split())


async def key(settings: Settings, role: str) -> str:
    """The key of a role. Waits for the file that the intervention service makes with its first start.

    Raises FileNotFoundError if there is none in time, OSError if it can't be read.
    """

    async def read() -> str:
        return await blocking(partial(settings.key_for, role))

    return await wait_for(f"the {role} key", read, settings.start_wait, (FileNotFoundError,))


async def model(settings: Settings, weights: bool = False) -> Manifest:
    """The manifest of the model to serve, once its folder has it, the tokenizer and, if asked for, weights.

    Raises ManifestError at once for a folder that isn't there, or holds something else than a servable model;
    ModelNotThere for an empty or incomplete one that isn't filled in time.
    """

    async def read() -> Manifest:
        return await blocking(partial(complete, settings.model, weights))  # a disk may hang

    return await wait_for("the model", read, settings.start_wait, (ModelNotThere,))


def complete(folder: Path, weights: bool) -> Manifest:
    """A model folder's manifest. Raises ManifestError, or ModelNotThere if it is being filled, as volumes are."""
    if _is_empty(folder):
        raise ModelNotThere(f"{folder} (BACKPACK_MODEL) is empty")
    manifest = Manifest.read(folder)
    wanted: list[tuple[str, tuple[str, ...]]] = [(TOKENIZER, (TOKENIZER,))]
    if weights:
        wanted += [("config.json", ("config.json",)), ("weights", _WEIGHTS)]
    for name, patterns in wanted:
        if not any(one.name != TOPICS for pattern in patterns for one in folder.glob(pattern)):
            raise ModelNotThere(f"{folder} (BACKPACK_MODEL) has a manifest.json and no {name}")
    return manifest


def _is_empty(folder: Path) -> bool:
    try:
        return not any(each.name != "lost+found" for each in folder.iterdir())
    except OSError:  # it isn't there, which is no matter of time
        return False


WHOLE_PASS_SECONDS = 600.0
"""How often, at most, the collector goes over all objects nevertheless, to free cycles among them."""

WHOLE_PASS_GROWTH = 1.25
"""How many times as many objects as after the last such pass, or as much memory, there has to be for one."""


def freeze_heap() -> None:
    """Take what a process has by now out of the collector's sight: it stays.

    It would go through all of it again and again, and meanwhile no stream moves: 0.1 s for modules, 0.2 s with torch.
    What it doesn't see is freed as ever when nobody refers to it; cycles aren't.
    """
    gc.collect()
    gc.freeze()


def keep_heap_frozen() -> None:
    """Freeze the heap now, and whatever survives the youngest objects' passes, until the process ends.

    So a pass sees some thousand objects and takes a millisecond or two, where one over the streams of a thousand
    readers, 100,000 objects, takes 0.1 s. There is one over everything only when the process has grown: until then,
    cycles that survived a pass before anybody let go of them stay.
    """
    freeze_heap()
    gc.callbacks.append(_FreezeSurvivors())


class _FreezeSurvivors:
    """A callback of the collector. Its generations: 0, objects of a moment; 1, what survived that; 2, the rest."""

    def __init__(self) -> None:
        self._whole_pass = False
        self._passed()

    def _passed(self) -> None:
        self._objects, self._memory = gc.get_freeze_count(), _resident()
        self._due = time.monotonic() + WHOLE_PASS_SECONDS

    @property
    def _grown(self) -> bool:
        objects, memory = WHOLE_PASS_GROWTH * self._objects, WHOLE_PASS_GROWTH * self._memory
        return gc.get_freeze_count() >= objects or _resident() >= memory > 0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase != "stop" or info["generation"] < (2 if self._whole_pass else 1):
            return
        if not self._whole_pass and time.monotonic() >= self._due:
            if self._grown:
                gc.unfreeze()  # the next pass over generation 2 sees all
                self._whole_pass = True
                return
            self._due = time.monotonic() + WHOLE_PASS_SECONDS
        gc.freeze()
        if self._whole_pass:
            self._whole_pass = False
            self._passed()


def _resident() -> int:
    """Pages of memory that the process has; 0 where the system doesn't tell it as Linux does."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return 0
