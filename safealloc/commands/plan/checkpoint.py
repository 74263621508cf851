"""How a checkpoint is quantized, layer by layer, as vLLM 0.32.0 reads it from ``quantization_config``."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from safealloc.commands.plan.architectures import ExpertSite, Site
from safealloc.formats.format import ScaleFormat

NVFP4 = "NVFP4"  # W4A4: the scheme whose activations have scales of ours
MX = {"MXFP8": ScaleFormat.mxfp8, "MXFP4": ScaleFormat.mxfp4}
"""Schemes whose activations have MX scales too: W8A8 and W4A4."""

NONE = "unquantized"

_MX_NAMES = {"MODELOPT_MXFP8": "MXFP8", "GPT_OSS_MXFP4": "MXFP4"}
"""vLLM's own names, which a configuration may have as its method."""

_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "backbone.")
"""What comes before ``layers.0`` in checkpoints' names."""

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""Layers that checkpoints may have in parts, which vLLM fuses."""

Lookup = Callable[[Sequence[str]], str | None]
"""The scheme of a module, given its possible names; ``None`` where nothing names it."""


class Checkpoint:
    """The schemes of a checkpoint's layers.

    Attributes:
        method: what the configuration says, in a word: "NVFP4", "FP8", "MIXED_PRECISION", "unquantized".
    """

    def __init__(self, method: str, default: str, lookup: Lookup, *, experts_only: bool = False) -> None:
        self.method = method
        self._default = default
        self._lookup = lookup
        self._experts_only = experts_only

    def scheme(self, layer: int, site: Site | ExpertSite) -> str:
        """The scheme of a site in one layer. Raises: ValueError: its parts have several, which vLLM refuses."""
        if self._experts_only and isinstance(site, Site):
            return NONE
        found = self._lookup(_names(layer, site.name))
        if found is not None:
            return found
        path, _, last = site.name.rpartition(".")
        if isinstance(site, ExpertSite):
            parts = [f"{site.name}.0.{projection}" for projection in site.projections]
        else:
            parts = [f"{path}.{part}" for part in _FUSED.get(last, ())]
        schemes = {self._lookup(_names(layer, part)) for part in parts} or {None}
        if len(schemes) > 1:
            raise ValueError(
                f"the configuration quantizes parts of layers.{layer}.{site.name} differently, which vLLM refuses"
            )
        return schemes.pop() or self._default


def _names(layer: int, name: str) -> list[str]:
    return [f"{prefix}layers.{layer}.{name}" for prefix in _PREFIXES]


def read(fields: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Checkpoint:
    """From a ``config.json`` and, where that says nothing, ``hf_quant_config.json``. Raises: ValueError: it is bad."""
    quantization = fields.get("quantization_config") or fields.get("compression_config") or beside
    if not quantization:
        return constant(NONE)
    if not isinstance(quantization, dict):
        raise ValueError(
            f"the configuration's quantization_config must be an object, it is {reprlib.repr(quantization)}"
        )
    inner = quantization.get("quantization", quantization)  # in hf_quant_config.json
    if not isinstance(inner, dict):
        raise ValueError(f"the configuration's quantization must be an object, it is {reprlib.repr(inner)}")
    if "quant_algo" in inner:
        return _modelopt(inner)
    if "config_groups" in quantization:
        return _compressed_tensors(quantization)
    left = _strings(quantization, "modules_to_not_convert") + _strings(quantization, "ignored_layers")
    method = str(quantization.get("quant_method", "unknown")).upper()
    method = _MX_NAMES.get(method, method)
    # gpt-oss: vLLM's Mxfp4Config quantizes routed experts alone.
    return constant(method, [*left, *(f"{name}.*" for name in left)], experts_only=method == "MXFP4")


def constant(scheme: str, ignored: Sequence[str] = (), *, experts_only: bool = False) -> Checkpoint:
    """Every layer has one scheme, but for ignored ones."""
    return Checkpoint(
        scheme, scheme, lambda names: NONE if _excluded(names, ignored) else None, experts_only=experts_only
    )


def _modelopt(fields: Mapping[str, Any]) -> Checkpoint:
    algorithm = str(fields["quant_algo"]).upper()
    ignored = _strings(fields, "exclude_modules") + _strings(fields, "ignore")
    if algorithm != "MIXED_PRECISION":
        groups = fields.get("config_groups")
        weights_only = isinstance(groups, dict) and not any(
            isinstance(group, dict) and group.get("input_activations") for group in groups.values()
        )
        if algorithm == NVFP4 and groups and weights_only:
            algorithm = "W4A16_NVFP4"  # as vLLM decides
        return constant(algorithm, ignored)
    layers = fields.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        raise ValueError("the configuration's quantized_layers must be an object that names layers")
    schemes = {name: _algorithm(recipe) for name, recipe in layers.items()}

    def lookup(names: Sequence[str]) -> str | None:
        if _excluded(names, ignored):
            return NONE
        return next((schemes[name] for name in names if name in schemes), None)

    return Checkpoint(algorithm, NONE, lookup)


def _algorithm(recipe: Any) -> str:
    if not isinstance(recipe, dict) or not isinstance(recipe.get("quant_algo"), str):
        raise ValueError(f"the configuration's quantized_layers need a quant_algo each, one has {reprlib.repr(recipe)}")
    return str(recipe["quant_algo"]).upper()


def _excluded(names: Iterable[str], patterns: Sequence[str]) -> bool:
    """As ModelOpt's lists are read: a pattern is a part of the name or a wildcard."""
    return any(pattern in name or fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _compressed_tensors(fields: Mapping[str, Any]) -> Checkpoint:
    groups = fields["config_groups"]
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError("the configuration's config_groups must be an object of objects")
    targets = {target: _scheme(group) for group in groups.values() for target in _strings(group, "targets")}
    ignored = _strings(fields, "ignore")

    def lookup(names: Sequence[str]) -> str | None:
        if any(_matches(name, pattern) for name in names for pattern in ignored):
            return NONE
        return next((found for target, found in targets.items() if any(_matches(name, target) for name in names)), None)

    default = targets.get("Linear", NONE)  # a class, routed experts among them
    schemes = sorted({*targets.values()})
    return Checkpoint(" and ".join(schemes) or NONE, default, lookup)


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return name == pattern
    try:
        return re.match(pattern[3:], name) is not None
    except re.error as error:
        raise ValueError(f"the configuration has a bad pattern {reprlib.repr(pattern)}: {error}") from error


def _scheme(group: Mapping[str, Any]) -> str:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        return NONE
    bits, kind = weights.get("num_bits"), str(weights.get("type", "int"))
    if (bits, kind, weights.get("strategy"), weights.get("group_size")) == (4, "float", "tensor_group", 16):
        return NVFP4 if inputs else "W4A16_NVFP4"
    if (bits, kind, weights.get("group_size")) == (4, "float", 32):
        return "W4A8_MXFP4" if isinstance(inputs, dict) and inputs.get("num_bits") == 8 else "MXFP4"
    if (bits, kind, weights.get("group_size")) == (8, "float", 32) and "uint8" in str(weights.get("scale_dtype")):
        return "MXFP8"
    return f"FP{bits}" if kind == "float" else f"{kind.upper()}{bits}"


def _strings(fields: Mapping[str, Any], name: str) -> list[str]:
    value = fields.get(name) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"the configuration's {name} must be a list of names, it is {reprlib.repr(value)}")
    return value
