"""Every ``SAFEALLOC_*`` environment variable: its name, its meaning, and the one place that reads it.

Variables are read when they are asked for, never at import: a worker process may be given others than its parent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

ENABLED = "SAFEALLOC"
STRICT = "SAFEALLOC_STRICT"
LINEAR = "SAFEALLOC_LINEAR"
QUANTIZER = "SAFEALLOC_QUANTIZER"
CONTRACT = "SAFEALLOC_CONTRACT"
VERIFY = "SAFEALLOC_VERIFY"
VERIFY_REPAIR = "SAFEALLOC_VERIFY_REPAIR"
POISON = "SAFEALLOC_POISON"
NAN = "SAFEALLOC_NAN"

MEANINGS = {
    ENABLED: "0 keeps the vLLM plugin off",
    STRICT: "1 raises pool errors in vLLM instead of logging them and letting vLLM allocate",
    LINEAR: "1 runs vLLM's NVFP4 linear layers through nvfp4_linear",
    QUANTIZER: "safealloc runs our kernels behind vLLM's quantization ops where they are equal and faster (default: vllm)",
    CONTRACT: "warn logs, error raises, where vLLM reads scales in another layout than they were written in (default: off)",
    VERIFY: "N checks a buffer's padding at every N-th handout and every N-th graph replay (default 0: never)",
    VERIFY_REPAIR: "1 zeroes and logs dirty padding instead of raising",
    POISON: "1 fills the valid bytes of new buffers with NaN",
    NAN: "1 names the layer, row and step of the first NaN that enters a quantizer",
}
"""What each variable does, in one line."""


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """How the default pool is watched; the fields are keyword arguments of :class:`safealloc.ScalePool`."""

    verify_every: int = 0
    verify_repair: bool = False
    poison: bool = False
    nan: bool = False


def enabled() -> bool:
    """Whether ``SAFEALLOC`` leaves the vLLM plugin on: whatever is not ``0`` does."""
    return os.environ.get(ENABLED, "1") != "0"


def strict() -> bool:
    """Whether ``SAFEALLOC_STRICT=1`` raises pool errors in vLLM."""
    return os.environ.get(STRICT, "0") == "1"


def linear() -> bool:
    """Whether ``SAFEALLOC_LINEAR=1`` puts our linear kernel before vLLM's."""
    return os.environ.get(LINEAR, "0") == "1"


def quantizer() -> bool:
    """Whether ``SAFEALLOC_QUANTIZER=safealloc`` puts our kernels behind vLLM's quantization ops.

    Raises:
        ValueError: it is set to anything but ``safealloc`` or ``vllm``.
    """
    text = os.environ.get(QUANTIZER, "") or "vllm"
    if text not in ("vllm", "safealloc"):
        raise ValueError(f"{QUANTIZER} must be vllm or safealloc, got {text!r}")
    return text == "safealloc"


def contract() -> str:
    """``off``, ``warn`` or ``error``: what is done where vLLM reads scales otherwise than they were written.

    Raises:
        ValueError: it is set to anything else.
    """
    text = os.environ.get(CONTRACT, "") or "off"
    if text not in ("off", "warn", "error"):
        raise ValueError(f"{CONTRACT} must be off, warn or error, got {text!r}")
    return text


def watching() -> bool:
    """Whether ``SAFEALLOC_VERIFY`` or ``SAFEALLOC_NAN`` is set to anything but 0; :func:`watch` checks the values."""
    return any(os.environ.get(name, "") not in ("", "0") for name in (VERIFY, NAN))


def watch() -> WatchSettings:
    """How the default pool is watched.

    Raises:
        ValueError: a variable has a value that it cannot have.
    """
    text = os.environ.get(VERIFY, "") or "0"
    # Kernels count handouts and replays in int32.
    if not (text.isascii() and text.isdecimal()) or len(text) > 10 or int(text) >= 2**31:
        raise ValueError(f"{VERIFY} must be a whole number below 2**31 (0 is off), got {text!r}")
    return WatchSettings(int(text), _switch(VERIFY_REPAIR), _switch(POISON), _switch(NAN))


def given() -> Iterator[tuple[str, str | None, str]]:
    """Every variable: its name, what it is set to (``None``: not set), and its meaning."""
    for name, meaning in MEANINGS.items():
        yield name, os.environ.get(name), meaning


def _switch(name: str) -> bool:
    text = os.environ.get(name, "") or "0"
    if text not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {text!r}")
    return text == "1"
