"""Where a model quantizes activations, from its Hugging Face configuration: vLLM's layers on one rank."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safealloc.formats.format import BLOCK_SIZE

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
_TOPK = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")
"""Experts per token: the names that vLLM 0.32.0 knows (``ModelArchConfigConvertorBase.get_num_experts_per_token``)."""


@dataclass(frozen=True, slots=True)
class Site:
    """Linear layers of one name and shape, each of which quantizes its input."""

    name: str  # as vLLM has it
    k: int  # columns of the input on one tensor-parallel rank
    n: int  # columns of the output there
    layers: tuple[int, ...]  # numbers of the model's layers that have one

    def as_dict(self) -> dict[str, Any]:
        """For JSON: how many layers instead of which."""
        return asdict(self) | {"layers": len(self.layers)}


@dataclass(frozen=True, slots=True)
class ExpertSite:
    """MoE layers of one name and shape, each of which quantizes the rows routed to its experts."""

    name: str  # as vLLM has it
    k: int  # columns of the input on one rank
    experts: int  # on that rank
    topk: int  # experts per token
    layers: tuple[int, ...]  # numbers of the model's layers that have one

    def as_dict(self) -> dict[str, Any]:
        """For JSON: how many layers instead of which."""
        return asdict(self) | {"layers": len(self.layers)}


def sites(fields: Mapping[str, Any], ranks: int) -> list[Site]:
    """The linear layers outside of the routed experts, in the order in which a layer runs them.

    Args:
        fields: of a ``config.json``.
        ranks: that a layer is split over.

    Raises:
        ValueError: the fields are not the configuration of a transformer, or it cannot be split that way; says why.
    """
    hidden, layers, heads = _sizes(fields)
    every = tuple(range(layers))
    expert = _expert_layers(fields, layers)
    dense = tuple(layer for layer in every if layer not in expert)
    found = _attention(fields, hidden, heads, every, ranks)
    if dense:
        found += _mlp("mlp", hidden, _number(fields, ["intermediate_size"]), dense, ranks)
    shared = _shared_width(fields)
    if expert and shared:
        found += _mlp("shared_experts", hidden, shared, tuple(sorted(expert)), ranks)
    _check_columns(found, ranks)
    return found


def expert_sites(fields: Mapping[str, Any], ranks: int, *, expert_parallel: bool = False) -> list[ExpertSite]:
    """The two quantizations of a routed expert layer, as vLLM's CUTLASS path has them (``run_cutlass_moe_fp4``).

    Args:
        fields: of a ``config.json``.
        ranks: that a layer is split over.
        expert_parallel: whether each rank has whole experts instead of a part of each; it sees all tokens either way.

    Returns:
        The input of the gate and up projection and that of the one down; nothing for a model without routed experts.

    Raises:
        ValueError: as :func:`sites`; or experts are to be split, and there are none.
    """
    hidden, layers, _ = _sizes(fields)
    expert = tuple(sorted(_expert_layers(fields, layers)))
    experts = _number(fields, _EXPERTS, 0)
    if expert_parallel and not experts:
        raise ValueError("the configuration has no routed experts, which expert parallelism would split")
    if not expert:
        return []
    topk = _number(fields, _TOPK)
    if not 1 <= topk <= experts:
        raise ValueError(f"the configuration routes a token to {topk} of {experts} experts: to at least 1, at most all")
    # Without a width of its own an expert is what the MLP would be (Mixtral, gpt-oss).
    width = _number(fields, ["moe_intermediate_size", "intermediate_size"])
    if expert_parallel:
        experts = _split(experts, ranks, "the model", "experts")
    else:
        width = _split(width, ranks, "experts.w2", "columns")
    found = [
        ExpertSite("experts.w13", hidden, experts, topk, expert),
        ExpertSite("experts.w2", width, experts, topk, expert),
    ]
    _check_columns(found, ranks)
    return found


def _sizes(fields: Mapping[str, Any]) -> tuple[int, int, int]:
    """Hidden size, layers and attention heads."""
    hidden = _number(fields, ["hidden_size"])
    layers = _number(fields, ["num_hidden_layers"])
    heads = _number(fields, ["num_attention_heads"])
    if min(hidden, layers, heads) < 1:
        raise ValueError(
            "the configuration's hidden_size, num_hidden_layers and num_attention_heads must be at least 1"
        )
    return hidden, layers, heads


def _check_columns(found: Sequence[Site | ExpertSite], ranks: int) -> None:
    for site in found:
        if site.k < BLOCK_SIZE or site.k % BLOCK_SIZE:
            raise ValueError(
                f"{site.name} has {site.k} columns on each of {ranks} ranks, not a multiple of {BLOCK_SIZE}"
            )


def _attention(fields: Mapping[str, Any], hidden: int, heads: int, layers: tuple[int, ...], ranks: int) -> list[Site]:
    if fields.get("kv_lora_rank"):
        return _latent_attention(fields, hidden, heads, layers, ranks)
    head = _number(fields, ["head_dim"], hidden // heads)
    own_heads = _split(heads, ranks, "qkv_proj", "heads")
    own_kv_heads = _kv_heads(_number(fields, ["num_key_value_heads"], heads), ranks)
    return [
        Site("qkv_proj", hidden, (own_heads + 2 * own_kv_heads) * head, layers),
        Site("o_proj", own_heads * head, hidden, layers),
    ]


def _kv_heads(heads: int, ranks: int) -> int:
    """On one rank; with more ranks than heads several ranks have the same one (vLLM's ``QKVParallelLinear``)."""
    if heads < 1:
        raise ValueError("the configuration's num_key_value_heads must be at least 1")
    if ranks > heads and ranks % heads:
        raise ValueError(f"qkv_proj has {heads} key and value heads, which cannot be copied evenly to {ranks} ranks")
    return 1 if ranks > heads else _split(heads, ranks, "qkv_proj", "key and value heads")


def _latent_attention(
    fields: Mapping[str, Any], hidden: int, heads: int, layers: tuple[int, ...], ranks: int
) -> list[Site]:
    """Multi-head latent attention: each rank projects into the latent space; projections out of it are split by heads."""
    rope, nope, value = (_number(fields, [name]) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    q_rank, kv_rank = _number(fields, ["q_lora_rank"], 0), _number(fields, ["kv_lora_rank"])
    own_heads = _split(heads, ranks, "o_proj", "heads")
    if q_rank:
        into = [
            Site("fused_qkv_a_proj", hidden, q_rank + kv_rank + rope, layers),
            Site("q_b_proj", q_rank, own_heads * (nope + rope), layers),
        ]
    else:
        into = [
            Site("q_proj", hidden, own_heads * (nope + rope), layers),
            Site("kv_a_proj_with_mqa", hidden, kv_rank + rope, layers),
        ]
    return [
        *into,
        Site("kv_b_proj", kv_rank, own_heads * (nope + value), layers),
        Site("o_proj", own_heads * value, hidden, layers),
    ]


def _mlp(name: str, hidden: int, width: int, layers: tuple[int, ...], ranks: int) -> list[Site]:
    own_width = _split(width, ranks, f"{name}.down_proj", "columns")
    return [
        Site(f"{name}.gate_up_proj", hidden, 2 * own_width, layers),
        Site(f"{name}.down_proj", own_width, hidden, layers),
    ]


def _expert_layers(fields: Mapping[str, Any], layers: int) -> frozenset[int]:
    """Numbers of the MoE layers: all but the first few (DeepSeek), or every n-th with exceptions (Qwen)."""
    if not _number(fields, _EXPERTS, 0):
        return frozenset()
    step = max(1, _number(fields, ["decoder_sparse_step", "moe_layer_freq"], 1))
    first = _number(fields, ["first_k_dense_replace"], 0)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(
            f"the configuration's mlp_only_layers must be a list of whole numbers, it is {reprlib.repr(dense)}"
        )
    dense = frozenset(dense)
    return frozenset(
        layer for layer in range(first, layers) if layer not in dense and (layer + (first == 0)) % step == 0
    )


def _shared_width(fields: Mapping[str, Any]) -> int:
    width = _number(fields, ["shared_expert_intermediate_size"], 0)
    return width or _number(fields, ["n_shared_experts"], 0) * _number(fields, ["moe_intermediate_size"], 0)


def _split(count: int, ranks: int, name: str, what: str) -> int:
    if count % ranks:
        raise ValueError(f"{name} has {count} {what}, which {ranks} ranks cannot share evenly")
    return count // ranks


def _number(fields: Mapping[str, Any], names: Sequence[str], default: int | None = None) -> int:
    """The first of these fields that is present and not null."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"the configuration's {name} must be a whole number, it is {reprlib.repr(value)}")
            return value
    if default is None:
        raise ValueError(f"the configuration has no {' or '.join(names)}")
    return default
