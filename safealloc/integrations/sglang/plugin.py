"""Registers the hooks with SGLang's hook registry: the entry point of ``sglang.srt.plugins``, and the same by hand.

The entry point hooks the start of a model runner only, in a process that has one. The rest is hooked, and imported, when a
runner loads a model that may have NVFP4 or MXFP8 layers on a CUDA device.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

from safealloc import settings
from safealloc._version import __version__
from safealloc.integrations.patches import Patches
from safealloc.integrations.sglang import runner, targets

logger = logging.getLogger("sglang.safealloc")
_REGISTRY = "sglang.srt.plugins.hook_registry"

_lock = threading.RLock()
_patches = Patches()
_placed: dict[str, tuple[object, object]] = {}  # by dotted name: the original and what stands in its place
_waiting = False
_hooked: tuple[str, ...] | None = None


def load() -> None:
    """The entry point, which SGLang calls in each of its processes; it never raises, and ``SAFEALLOC=0`` keeps it off."""
    global _waiting
    try:
        with _lock:
            if settings.enabled() and not _waiting and targets.LOAD.module in sys.modules:
                _place(targets.LOAD.path(targets.LOAD.attributes[0]), _load_model)
                _waiting = True
    except Exception as error:
        logger.warning("safealloc: not registered: %s: %s", type(error).__name__, error)


def registered() -> tuple[str, ...] | None:
    """The hooks that are registered in this process, or ``None``."""
    return _hooked


def register() -> None:
    """Make the pool the memory of SGLang's captured scales in this process; a second call changes nothing.

    Never raises, does not initialize CUDA, and makes no pool.
    """
    with _lock:
        if _hooked is not None:
            return
        try:
            _register()
        except Exception as error:
            logger.warning("safealloc: not registered: %s: %s", type(error).__name__, error)
            unregister()


def unregister() -> None:
    """Put every original back; a no-op where nothing is registered."""
    global _waiting, _hooked
    with _lock:
        was, _hooked, _waiting = _hooked, None, False
        registry = sys.modules.get(_REGISTRY)
        for path, (original, wrapped) in list(_placed.items()):
            _restore(path, original, wrapped)
            if registry is not None:
                registry.HookRegistry._hooks.pop(path, None)
                registry.HookRegistry._patched.discard(path)
        _placed.clear()
        serving = sys.modules.get("safealloc.integrations.sglang.serve")
        if serving is not None:
            serving.allocator.reset()
        if was is not None:
            logger.info("safealloc: unregistered")


def _register() -> None:
    global _hooked
    found = targets.installed()
    if found is None:
        raise ImportError("SGLang is not installed")
    version, source = found
    from safealloc.integrations.sglang.hooks import HOOKS
    from safealloc.integrations.sglang.serve import allocator

    hooked, left = [], []
    for finding in targets.check(version, source):
        target = finding.target
        if target is targets.LOAD:
            continue
        if finding.status != "hooked":
            if finding.status != "not yet there":
                left.append(f"{target.name} ({finding.detail})")
            continue
        assert isinstance(target, targets.Target)
        try:
            _place(target.path(finding.attribute), HOOKS[target])
            hooked.append(target.name)
        except Exception as error:  # such as a module that exists on some GPUs only
            left.append(f"{target.name} ({type(error).__name__}: {error})")
    _hooked = allocator.hooked = tuple(hooked)
    allocator.enabled = True
    logger.info("safealloc %s: registered for SGLang %s: %s", __version__, version, ", ".join(hooked))
    if left:
        logger.warning("safealloc: not hooked in SGLang %s: %s", version, "; ".join(left))


def _place(path: str, hook: Callable[..., Any]) -> None:
    """Hook one name through SGLang's registry, which only logs a failure.

    Raises:
        ImportError, AttributeError: there is no such name.
        RuntimeError: the registry did not take the hook.
    """
    registry = importlib.import_module(_REGISTRY)
    original = _resolve(path)
    if path in registry.HookRegistry._patched:
        raise RuntimeError("another plugin has hooked it")
    registry.HookRegistry.register(path, hook, registry.HookType.AROUND)
    registry.HookRegistry.apply_hooks()
    if _resolve(path) is original:
        registry.HookRegistry._hooks.pop(path, None)
        raise RuntimeError("SGLang's hook registry did not apply the hook")
    _placed[path] = original, _resolve(path)


def _resolve(path: str) -> Any:
    holder, name = _holder(path)
    return getattr(holder, name)


def _holder(path: str) -> tuple[Any, str]:
    parent, _, name = path.rpartition(".")
    try:
        return importlib.import_module(parent), name
    except ModuleNotFoundError:
        module, _, cls = parent.rpartition(".")
        return getattr(importlib.import_module(module), cls), name


def _restore(path: str, original: object, wrapped: object) -> None:
    """Also under the names that other modules have bound it to; what another plugin has put on top stays."""
    holder, name = _holder(path)
    if isinstance(holder, type) and vars(holder).get(name) is wrapped:
        setattr(holder, name, original)
    _patches.rebind(wrapped, original)


def _load_model(original: Callable[..., Any], model_runner: Any, *given: Any, **named: Any) -> Any:
    wanted = _waiting and str(getattr(model_runner, "device", "")).startswith("cuda") and _is_nvidia()
    if wanted and runner.may_have_blocks(model_runner):
        register()
    result = original(model_runner, *given, **named)
    if _hooked is not None:
        from safealloc.integrations.sglang import hooks
        from safealloc.integrations.sglang.serve import allocator

        try:
            hooks.begin(model_runner)
        except Exception as error:
            allocator.log_error(error, "SGLang goes on without it")
    return result


def _is_nvidia() -> bool:
    import torch

    return torch.version.hip is None
