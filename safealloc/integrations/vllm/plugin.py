"""Registers the hooks with vLLM: the entry point of ``vllm.general_plugins``, and the same by hand.

The entry point only waits for a worker that loads a model. Nothing is hooked, and nothing of the hooks imported, before one
has FP4 layers on a CUDA device, or with ``SAFEALLOC_CONTRACT`` MX layers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from safealloc import settings
from safealloc._version import __version__
from safealloc.integrations import drift
from safealloc.integrations.patches import Patches
from safealloc.integrations.vllm import quantization, targets
from safealloc.integrations.vllm.worker import logger

HOOKS_VERSION = 2
"""Part of vLLM's compile-cache key: raise it when the traced code changes."""

_NO_KEY = "its compile-cache key cannot be extended, so that vLLM would load code that was compiled without the hooks"
_LOGGER = "vllm.logger"

_lock = threading.RLock()
_patches = Patches()
_waiting = False  # for a worker that loads a model
_hooked: dict[str, drift.Target] | None = None
_contract = False  # whether the contract of scale layouts is checked


def load() -> None:
    """The entry point, which vLLM calls in each of its processes; it never raises, and ``SAFEALLOC=0`` keeps it off."""
    global _waiting
    try:
        with _lock:
            if settings.enabled() and not _waiting:
                _waiting = True
                _patches.when_imported(targets.START.module, _wait_for_a_model)
    except Exception as error:  # vLLM calls plugins unguarded
        logger.warning("safealloc: not registered: %s: %s", type(error).__name__, error)


def registered() -> tuple[str, ...] | None:
    """The hooks that are registered in this process, or ``None``."""
    return None if _hooked is None else tuple(_hooked)


def register() -> None:
    """Make the pool vLLM's scale allocator in this process; a second call changes nothing.

    A function is replaced in every module that has already imported it; a module that is imported later is hooked then. Never
    raises, does not initialize CUDA, and makes no pool.
    """
    with _lock:
        if _hooked is not None:
            return
        try:
            _register()
        except Exception as error:
            logger.warning("safealloc: not registered: %s: %s", type(error).__name__, error)
            _unregister()
            return
        _add_contract()


def unregister() -> None:
    """Put every original of vLLM back, and wait for no model; a no-op where nothing is registered.

    What another plugin has put on top of a hook stays, and works: the hook below it calls vLLM.
    """
    with _lock:
        was_registered = _hooked is not None
        if was_registered or _waiting or _contract:
            _unregister()
        if was_registered:
            logger.info("safealloc: unregistered")


def _unregister() -> None:
    global _hooked, _waiting, _contract
    _hooked, _waiting, _contract = None, False, False
    try:
        _patches.restore()
    except Exception as error:
        logger.warning("safealloc: not all of vLLM was put back: %s: %s", type(error).__name__, error)
    from safealloc.integrations.vllm.serve import allocator

    allocator.reset()


def _wait_for_a_model(module: ModuleType) -> None:
    try:
        _patches.wrap(module.Worker, "load_model", _load_model)
    except AttributeError as error:
        logger.warning("safealloc: not registered: this vLLM is not known: %s", error)


def _load_model(original: Callable[..., Any], worker: Any, *given: Any, **named: Any) -> Any:
    if _waiting and _is_wanted(worker, quantization.may_have_fp4):
        register()
    elif _waiting and _is_wanted(worker, quantization.may_have_mx):
        with _lock:
            _add_contract()
    return original(worker, *given, **named)


def _add_contract() -> None:
    """Check the contract of scale layouts, where ``SAFEALLOC_CONTRACT`` asks for it; never raises."""
    global _contract
    try:
        mode = settings.contract()
        if mode != "off" and not _contract:
            importlib.import_module(_LOGGER)
            from safealloc.integrations.vllm import contract_hooks

            contract_hooks.install(_patches, mode)
            _contract = True
    except Exception as error:
        logger.warning("safealloc: the contract of scale layouts is not checked: %s: %s", type(error).__name__, error)


def _is_wanted(worker: Any, has_layers: Callable[[Any], bool]) -> bool:
    """Whether a worker has a CUDA device of NVIDIA's, and layers by its configuration."""
    import torch

    device = getattr(worker, "device", None)
    if getattr(device, "type", None) != "cuda" or torch.version.hip is not None:
        return False
    try:
        return has_layers(worker.vllm_config)
    except Exception as error:
        logger.debug("safealloc: the model's quantization is not known: %s: %s", type(error).__name__, error)
        return True


def _register() -> None:
    global _hooked
    found = targets.installed()
    if found is None:
        raise ImportError("vLLM is not installed")
    version, source = found
    importlib.import_module(_LOGGER)  # sets up the handlers for the messages below
    from safealloc.integrations.vllm.serve import allocator

    skipped = {targets.START} | (set() if settings.watching() else {targets.STEP})
    findings = [one for one in targets.check(version, source) if one.target not in skipped]
    fits = [finding for finding in findings if finding.status == "hooked"]
    if all(finding.target is not targets.CACHE_KEY for finding in fits):
        raise ImportError(_NO_KEY)
    _hooked = allocator.hooked = {finding.target.name: finding.target for finding in fits}
    with _patches.one_pass():
        for module, same in itertools.groupby(sorted(fits, key=_module), _module):
            _patches.when_imported(module, functools.partial(_apply, list(same)))
    if _hooked is None:
        raise ImportError(_NO_KEY)
    allocator.enabled = True
    logger.info("safealloc %s: registered for vLLM %s: %s", __version__, version, ", ".join(_hooked))
    not_hooked = [finding for finding in findings if finding.status in ("changed", "missing")]
    if not_hooked:
        reasons = "; ".join(f"{finding.target.name} ({finding.detail})" for finding in not_hooked)
        logger.warning("safealloc: not hooked in vLLM %s: %s", version, reasons)


def _module(finding: drift.Finding) -> str:
    return finding.target.module


def _apply(findings: Sequence[drift.Finding], module: ModuleType) -> None:
    """Replace the targets of a module; one that is not vLLM's own, or whose hook fails, is left alone and named."""
    from safealloc.integrations.vllm.hooks import HOOKS

    hooks = HOOKS | {targets.CACHE_KEY: _cache_key}
    others = [targets.replaced_by(finding, module) for finding in findings]  # before the first is replaced
    with _patches.one_pass():
        for finding, other in zip(findings, others, strict=True):
            target, name = finding.target, finding.attribute
            reason = "" if other is None else f"another plugin has {other}"
            there = hasattr(module, name.partition(".")[0])  # some exist only where FlashInfer is installed
            if there and not reason:
                try:
                    hooks[target](_patches, module, name)
                    continue
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}"
                    if target is targets.CACHE_KEY:
                        _unregister()
            if _hooked is not None:  # else it was unregistered meanwhile
                _hooked.pop(target.name, None)
            if reason:
                logger.warning("safealloc: %s is not hooked: %s", target.name, reason)


def _cache_key(patches: Patches, module: ModuleType, name: str) -> None:
    """Keep compiled code of a hooked vLLM and of a plain one apart in vLLM's cache, for models that may have FP4 layers."""
    patches.wrap(module.VllmConfig, name.partition(".")[2], _compute_hash)


def _compute_hash(original: Callable[..., str], vllm_config: Any, *given: Any, **named: Any) -> str:
    key = original(vllm_config, *given, **named)
    if _hooked is None or not quantization.may_have_fp4(vllm_config):
        return key
    traced = [name for name in _hooked if name != targets.STEP.name]  # that hook is around a step, not in compiled code
    from safealloc.integrations.vllm.replace import is_asked_for

    asked = {"first": settings.linear(), "quantizer": is_asked_for()}  # for the latter Inductor reuses no scales in 8x4
    state = ",".join([str(HOOKS_VERSION), *traced, *(name for name, value in asked.items() if value)])
    return f"{key}-{hashlib.sha256(state.encode()).hexdigest()[:10]}"
