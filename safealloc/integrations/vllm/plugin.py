"""Registers the hooks with vLLM: the entry point of ``vllm.general_plugins``, and the same by hand."""

from __future__ import annotations

import functools
import importlib
import threading
from types import ModuleType

from safealloc import settings
from safealloc._version import __version__
from safealloc.integrations.vllm import targets
from safealloc.integrations.vllm.hooks import HOOKS
from safealloc.integrations.vllm.patches import Patches
from safealloc.integrations.vllm.serve import allocator
from safealloc.integrations.vllm.worker import logger

HOOKS_VERSION = 1
"""Part of vLLM's compile-cache key: raise it when the traced code changes."""

CACHE_KEY = "SAFEALLOC_VLLM_HOOKS"
_LOGGER = "vllm.logger"

_lock = threading.RLock()
_patches = Patches()
_hooked: tuple[str, ...] | None = None


def load() -> None:
    """The entry point, which vLLM calls in each of its processes: :func:`register`, unless ``SAFEALLOC=0``."""
    if settings.enabled():
        register()


def registered() -> tuple[str, ...] | None:
    """The hooks that are registered in this process, or ``None``."""
    return _hooked


def register() -> None:
    """Make the pool vLLM's scale allocator in this process; a second call changes nothing.

    A function is replaced in every module that has already imported it; a module that is imported later is hooked then. Never
    raises, does not initialize CUDA, and makes no pool.
    """
    global _hooked
    with _lock:
        if _hooked is not None:
            return
        _hooked = ()
        try:
            _hooked = _register()
        except Exception as error:  # vLLM calls plugins unguarded
            logger.warning("safealloc: not registered: %s: %s", type(error).__name__, error)
            _unregister()


def unregister() -> None:
    """Put every original of vLLM back; a no-op where nothing is registered."""
    with _lock:
        if _hooked is not None:
            _unregister()
            logger.info("safealloc: unregistered")


def _unregister() -> None:
    global _hooked
    _patches.restore()
    _hooked = None
    allocator.reset()


def _register() -> tuple[str, ...]:
    found = targets.installed()
    if found is None:
        raise ImportError("vLLM is not installed")
    version, source = found
    importlib.import_module(_LOGGER)  # sets up the handlers for the messages below
    findings = [one for one in targets.check(version, source) if one.target is not targets.STEP or settings.watching()]
    hooked = tuple(finding.target.name for finding in findings if finding.status == "hooked")
    _add_cache_key(hooked)
    for finding in findings:
        hook = HOOKS.get(finding.target)
        if finding.status == "hooked" and hook is not None:
            _patches.when_imported(finding.target.module, functools.partial(_apply, finding))
    allocator.enabled = True
    logger.info("safealloc %s: registered for vLLM %s: %s", __version__, version, ", ".join(hooked))
    not_hooked = [finding for finding in findings if finding.status in ("changed", "missing")]
    if not_hooked:
        reasons = "; ".join(f"{finding.target.name} ({finding.detail})" for finding in not_hooked)
        logger.warning("safealloc: not hooked in vLLM %s: %s", version, reasons)
    return hooked


def _apply(finding: targets.Finding, module: ModuleType) -> None:
    """Replace one target in its module; an error is logged, and leaves that target to vLLM."""
    target, name = finding.target, finding.attribute
    if not hasattr(module, name.partition(".")[0]):
        return  # defined only where FlashInfer is installed
    try:
        HOOKS[target](_patches, module, name)
    except Exception as error:
        logger.warning("safealloc: %s is not hooked: %s: %s", target.name, type(error).__name__, error)


def _add_cache_key(hooked: tuple[str, ...]) -> None:
    """Keep compiled code of a hooked vLLM and of a plain one apart in vLLM's cache."""
    traced = [name for name in hooked if name != targets.STEP.name]  # that hook is around a step, not in compiled code
    state = f"{','.join([str(HOOKS_VERSION), *traced])}{',first' if settings.linear() else ''}"
    variables = importlib.import_module(targets.CACHE_KEY.module).environment_variables
    variables[CACHE_KEY] = lambda: state
    _patches.undo_by(lambda: variables.pop(CACHE_KEY, None))
