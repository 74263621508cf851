"""What an integration's calls and engines have in common: who has a pool, and what becomes of errors."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import Tensor

from safealloc import settings
from safealloc.errors import PaddingCorruptionError, PoolClosedError, SafeAllocError
from safealloc.formats.format import BLOCK_SIZE
from safealloc.formats.layout import SfLayout
from safealloc.integrations import startup
from safealloc.integrations.startup import Engine
from safealloc.pool.default import use_pool

_LAYOUT_128X4 = SfLayout.layout_128x4
ENGINE = "_safealloc_engine"
"""Attribute of a worker: its :class:`Engine`."""


class Allocator:
    """Answers a framework's calls in one process."""

    framework: str
    """As the log names it."""
    logger: logging.Logger

    def __init__(self) -> None:
        self._engines: set[Engine] = set()
        self.engine: Engine | None = None  # whose profile run or captures are under way
        self.reset()

    def reset(self) -> None:
        """As if nothing were hooked; gives back what the engines have."""
        self.enabled = False  # whether the plugin is registered
        self.hooked: Collection[str] = ()  # names of the targets that are hooked
        self._logged: set[tuple[type, str]] = set()  # kinds of errors
        for engine in list(self._engines):
            if engine is self.engine:
                self.engine = None
            self._end(engine)

    def handle_error(self, error: Exception) -> str:
        """Raise an error, or log it if it is the first of its kind; returns why the framework allocates instead."""
        self.log_error(error, f"{self.framework} allocates instead")
        return startup.POOL_ERROR if isinstance(error, SafeAllocError) else startup.OTHER_ERROR

    def note(self, note: Callable[..., None], *given: Any) -> None:
        """Call what only keeps accounts; its errors do not reach the framework."""
        try:
            note(*given)
        except Exception as error:
            self.log_error(error, "the line after the captures may be wrong")

    def log_error(self, error: Exception, what: str) -> None:
        """Log an error, once per kind, unless :func:`is_raised` says otherwise."""
        if is_raised(error):
            raise error
        if (type(error), what) not in self._logged:
            self._logged.add((type(error), what))
            source = "the pool failed" if isinstance(error, SafeAllocError) else "an error was met"
            self.logger.error("safealloc: %s; %s; logged once: %s: %s", source, what, type(error).__name__, error)

    # --- an engine's life ---------------------------------------------------------------------------------------------

    def begun(self, worker: Any, engine: Engine) -> None:
        """Keep an engine for as long as its worker lives."""
        self._engines.add(engine)
        setattr(worker, ENGINE, engine)
        weakref.finalize(worker, self._end, engine).atexit = False

    @contextlib.contextmanager
    def working(self, engine: Engine) -> Iterator[None]:
        """Inside, calls are those of the engine's profile run, or of its captures and their warm-ups."""
        before = self.engine
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self, "engine", before)
            self.engine = engine
            if engine.pool is not None:
                try:
                    try:
                        stack.enter_context(use_pool(engine.pool))  # for our linear kernel
                    except PoolClosedError:  # by somebody else
                        engine.reserve()
                        stack.enter_context(use_pool(engine.pool))
                except Exception as error:
                    self.log_error(error, f"{self.framework} allocates instead")
            yield

    def end(self, worker: Any) -> None:
        """Give back what a worker's engine has; a no-op where it has nothing."""
        engine = engine_of(worker)
        if engine is not None:
            delattr(worker, ENGINE)
            self._end(engine)

    def _end(self, engine: Engine) -> None:
        self._engines.discard(engine)
        try:
            engine.close()
        except Exception as error:
            self.logger.error("safealloc: an engine's pool was not closed: %s: %s", type(error).__name__, error)


def engine_of(worker: Any) -> Engine | None:
    """The engine of a worker, once its sizes are known."""
    engine: Engine | None = getattr(worker, ENGINE, None)
    return engine


def is_raised(error: Exception) -> bool:
    """Whether an error is raised instead of logged: dirty padding always is, since tokens may be wrong."""
    return settings.strict() or isinstance(error, PaddingCorruptionError)


def zero_padding(scales: Tensor, m: int, n: int) -> None:
    """Zero the tiles with padding rows or columns before a producer writes; int32 ``[rounded_m, rounded_n // 4]`` in 128x4.

    A fill of a slice costs the host a fifth of what a Triton launch costs, and few producers have padding columns.
    """
    tile = _LAYOUT_128X4.tile
    full_rows, full_tiles = m // tile.rows * tile.rows, n // BLOCK_SIZE // tile.cols
    if full_rows < scales.shape[0]:
        scales[full_rows:].zero_()
    if full_tiles < scales.shape[1]:  # one int32 is a row of a tile
        scales.view(-1, scales.shape[1], tile.rows)[:, full_tiles:].zero_()
