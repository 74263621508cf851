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


_Shape = tuple[str, int, int]
"""The first three fields of a :class:`Site`."""


@dataclass(frozen=True, slots=True)
class Site:
    """Linear layers of one name and shape, each of which quantizes its input."""

    name: str  # as vLLM has it
    k: int  # columns of the input on one tensor-parallel rank
    n: int  # columns of the output there
    layers: tuple[int, ...]  # numbers of the model's layers that have one


@dataclass(frozen=True, slots=True)
class ExpertSite:
    """MoE layers of one name and shape, each of which quantizes the rows routed to its experts."""

    name: str  # as vLLM has it
    k: int  # columns of the input on one rank
    experts: int  # on that rank
    topk: int  # experts per token
    layers: tuple[int, ...]  # numbers of the model's layers that have one


def as_dict(site: Site | ExpertSite) -> dict[str, Any]:
    """For JSON: how many layers instead of which."""
    return asdict(site) | {"layers": len(site.layers)}


def sites(fields: Mapping[str, Any], ranks: int) -> list[Site]:
    """The linear layers outside of the routed experts, in the order in which a layer runs them.

    Raises:
        ValueError: the fields are not those of a transformer's ``config.json``, or it cannot be split over so many ranks.
    """
    hidden, layers, heads = _sizes(fields)
    every = tuple(range(layers))
    expert = _expert_layers(fields, layers)
    dense = tuple(sorted({*every} - {*expert}))
    attention = _latent_attention if fields.get("kv_lora_rank") else _attention
    found = [Site(*shape, every) for shape in attention(fields, hidden, heads, ranks)]
    if dense:
        found += [Site(*shape, dense) for shape in _mlp("mlp", hidden, _number(fields, ["intermediate_size"]), ranks)]
    shared = _number(fields, ["shared_expert_intermediate_size"], 0)
    shared = shared or _number(fields, ["n_shared_experts"], 0) * _number(fields, ["moe_intermediate_size"], 0)
    if expert and shared:
        found += [Site(*shape, expert) for shape in _mlp("shared_experts", hidden, shared, ranks)]
    _check_columns(found, ranks)
    return found


def expert_sites(fields: Mapping[str, Any], ranks: int, *, expert_parallel: bool = False) -> list[ExpertSite]:
    """The two quantizations of a routed expert layer, as vLLM's CUTLASS path has them (``run_cutlass_moe_fp4``).

    With ``expert_parallel`` each rank has whole experts instead of a part of each; it sees all tokens either way.

    Returns:
        The input of the gate and up projection and that of the one down; nothing for a model without routed experts.

    Raises:
        ValueError: as :func:`sites`; or experts are to be split, and there are none.
    """
    hidden, layers, _ = _sizes(fields)
    expert = _expert_layers(fields, layers)
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
    ks = {"experts.w13": hidden, "experts.w2": width}
    found = [ExpertSite(name, k, experts, topk, expert) for name, k in ks.items()]
    _check_columns(found, ranks)
    return found


def _sizes(fields: Mapping[str, Any]) -> tuple[int, int, int]:
    """Hidden size, layers and attention heads."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    hidden, layers, heads = (_number(fields, [name]) for name in names)
    if min(hidden, layers, heads) < 1:
        raise ValueError(f"the configuration's {names[0]}, {names[1]} and {names[2]} must be at least 1")
    return hidden, layers, heads


def _check_columns(found: Sequence[Site | ExpertSite], ranks: int) -> None:
    for site in found:
        if site.k < BLOCK_SIZE or site.k % BLOCK_SIZE:
            raise ValueError(
                f"{site.name} has {site.k} columns on each of {ranks} ranks, not a multiple of {BLOCK_SIZE}"
            )


def _attention(fields: Mapping[str, Any], hidden: int, heads: int, ranks: int) -> list[_Shape]:
    head = _number(fields, ["head_dim"], hidden // heads)
    own_heads = _split(heads, ranks, "qkv_proj", "heads")
    own_kv_heads = _kv_heads(_number(fields, ["num_key_value_heads"], heads), ranks)
    return [("qkv_proj", hidden, (own_heads + 2 * own_kv_heads) * head), ("o_proj", own_heads * head, hidden)]


def _kv_heads(heads: int, ranks: int) -> int:
    """On one rank; with more ranks than heads several ranks have the same one (vLLM's ``QKVParallelLinear``)."""
    if heads < 1:
        raise ValueError("the configuration's num_key_value_heads must be at least 1")
    if ranks > heads and ranks % heads:
        raise ValueError(f"qkv_proj has {heads} key and value heads, which cannot be copied evenly to {ranks} ranks")
    return 1 if ranks > heads else _split(heads, ranks, "qkv_proj", "key and value heads")


def _latent_attention(fields: Mapping[str, Any], hidden: int, heads: int, ranks: int) -> list[_Shape]:
    """Multi-head latent attention: each rank projects into the latent space; projections out of it are split by heads."""
    rope, nope, value = (_number(fields, [name]) for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    q_rank, kv_rank = _number(fields, ["q_lora_rank"], 0), _number(fields, ["kv_lora_rank"])
    own_heads = _split(heads, ranks, "o_proj", "heads")
    query = own_heads * (nope + rope)
    if q_rank:
        into = [("fused_qkv_a_proj", hidden, q_rank + kv_rank + rope), ("q_b_proj", q_rank, query)]
    else:
        into = [("q_proj", hidden, query), ("kv_a_proj_with_mqa", hidden, kv_rank + rope)]
    return [*into, ("kv_b_proj", kv_rank, own_heads * (nope + value)), ("o_proj", own_heads * value, hidden)]


def _mlp(name: str, hidden: int, width: int, ranks: int) -> list[_Shape]:
    own_width = _split(width, ranks, f"{name}.down_proj", "columns")
    return [(f"{name}.gate_up_proj", hidden, 2 * own_width), (f"{name}.down_proj", own_width, hidden)]


def _expert_layers(fields: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Numbers of the MoE layers: all but the first few (DeepSeek), or every n-th with exceptions (Qwen)."""
    if not _number(fields, _EXPERTS, 0):
        return ()
    step = max(1, _number(fields, ["decoder_sparse_step", "moe_layer_freq"], 1))
    first = _number(fields, ["first_k_dense_replace"], 0)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        given = reprlib.repr(dense)
        raise ValueError(f"the configuration's mlp_only_layers must be a list of whole numbers, it is {given}")
    others = (layer for layer in range(first, layers) if (layer + (first == 0)) % step == 0)
    return tuple(sorted({*others} - {*dense}))


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
