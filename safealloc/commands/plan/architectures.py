"""The linear layers that vLLM 0.32.0 runs in a captured step, by architecture, with their shapes on one rank.

Not among them: routers, which checkpoints leave unquantized; the language-model head, which runs outside of CUDA graphs;
``kv_b_proj`` of latent attention, which only prefill runs, inside the attention op; vision towers; draft models.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safealloc.commands.plan.deployment import Deployment
from safealloc.formats.format import BLOCK_SIZE

_MOST_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class Site:
    """Linear layers of one name and shape, each of which quantizes its input."""

    name: str  # as vLLM has it, from the layer down
    k: int  # columns of the input on one rank
    n: int  # columns of the output there
    layers: tuple[int, ...] = ()  # numbers of the model's layers that have one
    row_ranks: int = 1  # ranks that share the rows of a batch


@dataclass(frozen=True, slots=True)
class ExpertSite:
    """Routed experts of one shape on one rank; their weights are w13 and w2."""

    name: str  # as vLLM has it, from the layer down
    k: int  # columns of the input
    width: int  # columns of the input of w2
    experts: int  # on that rank
    topk: int  # experts per token
    projections: tuple[str, ...]  # names of one expert's weights in a checkpoint
    layers: tuple[int, ...] = ()  # numbers of the model's layers that have them

    @property
    def gated(self) -> bool:
        """Whether w13 is two projections, gate and up."""
        return len(self.projections) == 3

    @property
    def n(self) -> int:
        """Columns of the output of w13."""
        return self.width * (1 + self.gated)


def as_dict(site: Site | ExpertSite) -> dict[str, Any]:
    """For JSON: how many layers instead of which."""
    return {"name": site.name, "k": site.k, "n": site.n, "layers": len(site.layers)}


class Model:
    """A configuration's fields, and how the model is divided. Every method raises ValueError where that cannot be."""

    def __init__(self, fields: Mapping[str, Any], deployment: Deployment) -> None:
        self.fields = fields
        self.deployment = deployment

    def number(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A field; ``default`` is for one that is absent or null."""
        value = self.fields.get(name)
        if value is None:
            if default is None:
                raise ValueError(f"the configuration has no {name}")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            given = reprlib.repr(value)
            raise ValueError(f"the configuration's {name} must be a whole number of at least {least}, it is {given}")
        return value

    def items(self, name: str, kind: type, least: int = 0) -> list[Any]:
        """A field that is a list."""
        value = self.fields.get(name) or []
        if not isinstance(value, list) or len(value) < least or not all(type(item) is kind for item in value):
            given = reprlib.repr(value)
            what = f"{'names' if kind is str else 'whole numbers'}, {least} at least"
            raise ValueError(f"the configuration's {name} must be a list of {what}, it is {given}")
        return value

    def split(self, count: int, name: str, what: str = "columns", ranks: int | None = None) -> int:
        """The share of each rank, of the tensor-parallel ones by default."""
        ranks = ranks or self.deployment.tensor
        if count % ranks:
            raise ValueError(f"{name} has {count} {what}, which {ranks} ranks cannot share evenly")
        return count // ranks

    @property
    def hidden(self) -> int:
        return self.number("hidden_size")


Part = Iterator[Site | ExpertSite]


def _attention(
    model: Model, layer: int, prefix: str = "self_attn", *, head_dim: int | None = None, gate: bool = False
) -> Part:
    """``head_dim`` is the default of the architecture; with ``gate`` each query head brings a gate."""
    heads = model.number("num_attention_heads")
    own = model.split(heads, f"{prefix}.qkv_proj", "heads")
    kv = _kv_heads(model.number("num_key_value_heads", heads), model.deployment.tensor)
    head = model.number("head_dim", model.number("attention_head_dim", head_dim or model.hidden // heads))
    yield Site(f"{prefix}.qkv_proj", model.hidden, (own * (1 + gate) + 2 * kv) * head)
    yield Site(f"{prefix}.o_proj", own * head, model.hidden)


def _kv_heads(heads: int, ranks: int) -> int:
    """On one rank; with more ranks than heads several ranks have the same one (vLLM's ``QKVParallelLinear``)."""
    if max(heads, ranks) % min(heads, ranks):
        raise ValueError(f"qkv_proj has {heads} key and value heads, which {ranks} ranks cannot share or copy evenly")
    return max(1, heads // ranks)


def _latent_attention(model: Model, layer: int) -> Part:
    """Multi-head latent attention: each rank projects into the latent space; projections out of it are split by heads."""
    names = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank")
    rope, nope, value, latent = map(model.number, names)
    own = model.split(model.number("num_attention_heads"), "self_attn.o_proj", "heads")
    rank = model.number("q_lora_rank", 0)
    if rank:
        yield Site("self_attn.fused_qkv_a_proj", model.hidden, rank + latent + rope)
        yield Site("self_attn.q_b_proj", rank, own * (nope + rope))
    else:
        yield Site("self_attn.q_proj", model.hidden, own * (nope + rope))
        yield Site("self_attn.kv_a_proj_with_mqa", model.hidden, latent + rope)
    if index_heads := model.number("index_n_heads", 0):  # sparse attention
        yield Site("self_attn.indexer.wq_b", rank, index_heads * model.number("index_head_dim"))
    yield Site("self_attn.o_proj", own * value, model.hidden)


def _gated_or_delta_net(model: Model, layer: int) -> Part:
    """Attention with gates in every fourth layer or as ``layer_types`` says, Gated DeltaNet in the others."""
    if model.fields.get("layer_types") is not None:
        full = model.items("layer_types", str, layer + 1)[layer] == "full_attention"
    else:
        full = (layer + 1) % model.number("full_attention_interval", 4) == 0
    if full:
        yield from _attention(model, layer, head_dim=256, gate=model.fields.get("attn_output_gate", True) is True)
        return
    names = ("linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim")
    keys, key, values, value = map(model.number, names)
    keys = model.split(keys, "linear_attn.in_proj_qkvz", "key heads")
    values = model.split(values, "linear_attn.in_proj_qkvz", "value heads")
    yield Site("linear_attn.in_proj_qkvz", model.hidden, 2 * (keys * key + values * value))
    yield Site("linear_attn.in_proj_ba", model.hidden, 2 * values)
    yield Site("linear_attn.out_proj", values * value, model.hidden)


def _mamba(model: Model) -> Part:
    heads, dim, groups, state = map(model.number, ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"))
    ranks = model.deployment.tensor
    heads = model.split(heads, "mixer.in_proj", "heads")
    groups = 1 if groups % ranks else groups // ranks  # vLLM copies groups that it cannot split
    yield Site("mixer.in_proj", model.hidden, 2 * (heads * dim + groups * state) + heads)
    yield Site("mixer.out_proj", heads * dim, model.hidden)


def _mlp(
    model: Model, layer: int, name: str = "mlp", width: int | None = None, *, gated: bool = True, shared: bool = False
) -> Part:
    """``width`` is the intermediate size if it is not given; ``shared``: ranks may share the rows, not the columns."""
    width = width or model.number("intermediate_size")
    ranks = model.deployment.row_ranks if shared else 1
    own = model.split(width, f"{name}.down_proj") if ranks == 1 else width
    yield Site(f"{name}.{'gate_up_proj' if gated else 'up_proj'}", model.hidden, own * (1 + gated), row_ranks=ranks)
    yield Site(f"{name}.down_proj", own, model.hidden, row_ranks=ranks)


def _experts(
    model: Model,
    layer: int,
    name: str = "mlp.experts",
    *,
    count: str = "num_local_experts",
    width: str = "intermediate_size",
    k: int | None = None,
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> Part:
    """``count`` and ``width`` are names of fields; ``k`` is the hidden size if it is not given."""
    experts, columns, topk = map(model.number, (count, width, "num_experts_per_tok"))
    if topk > experts:
        raise ValueError(f"the configuration routes a token to {topk} of {experts} experts")
    ranks = model.deployment.expert_ranks
    if model.deployment.expert_parallel:
        experts = -(-experts // ranks)  # of the ranks that have the most
    else:
        columns = model.split(columns, name, ranks=ranks)
    yield ExpertSite(name, k or model.hidden, columns, experts, topk, projections)


def _qwen_mlp(model: Model, layer: int) -> Part:
    """Experts in every n-th layer, with exceptions; the shared one is ``shared_expert``."""
    step = model.number("decoder_sparse_step", 1)
    if layer in model.items("mlp_only_layers", int) or (layer + 1) % step or not model.number("num_experts", 0, 0):
        yield from _mlp(model, layer)
        return
    if shared := model.number("shared_expert_intermediate_size", 0, 0):
        yield from _mlp(model, layer, "mlp.shared_expert", shared, shared=True)
    yield from _experts(model, layer, count="num_experts", width="moe_intermediate_size")


def _first_dense(model: Model, layer: int, *, shared_by_rows: bool = True) -> Part:
    """The first layers are dense, the others have routed and shared experts."""
    if layer < model.number("first_k_dense_replace", 0, 0) or layer % model.number("moe_layer_freq", 1):
        yield from _mlp(model, layer)
        return
    if shared := model.number("n_shared_experts", 0, 0):
        width = shared * model.number("moe_intermediate_size")
        yield from _mlp(model, layer, "mlp.shared_experts", width, shared=shared_by_rows)
    yield from _experts(model, layer, count="n_routed_experts", width="moe_intermediate_size")


def _llama4_mlp(model: Model, layer: int) -> Part:
    """Experts in every n-th layer, with a shared one of their width; the others have an MLP of a width of its own."""
    step = model.number("interleave_moe_layer_step", 1, 0)
    if not step or (layer + 1) % step:
        yield from _mlp(model, layer, "feed_forward", model.number("intermediate_size_mlp"))
        return
    yield from _mlp(model, layer, "feed_forward.shared_expert", shared=True)
    yield from _experts(model, layer, "feed_forward.experts")


def _nemotron_kinds(model: Model) -> Sequence[str]:
    """What each layer is: a letter of ``hybrid_override_pattern``, or a name of ``layers_block_type``."""
    pattern = model.fields.get("hybrid_override_pattern")
    return pattern if isinstance(pattern, str) else model.items("layers_block_type", str, 1)


def _nemotron_h(model: Model, layer: int) -> Part:
    """One mixer in a layer: Mamba 2, attention, an MLP that is not gated, or such experts, perhaps in a latent space."""
    kind = _nemotron_kinds(model)[layer]
    if kind in ("M", "mamba"):
        yield from _mamba(model)
    elif kind in ("*", "attention"):
        yield from _attention(model, layer, "mixer")
    elif kind in ("-", "mlp"):
        yield from _mlp(model, layer, "mixer", gated=False)
    elif kind in ("E", "moe"):
        if shared := model.number("n_shared_experts", 0, 0):
            width = shared * model.number("moe_shared_expert_intermediate_size")
            yield from _mlp(model, layer, "mixer.shared_experts", width, gated=False, shared=True)
        latent = model.number("moe_latent_size", 0) or None
        if latent:
            yield Site("mixer.fc1_latent_proj", model.hidden, latent, row_ranks=model.deployment.row_ranks)
            yield Site("mixer.fc2_latent_proj", latent, model.hidden, row_ranks=model.deployment.row_ranks)
        names = {"count": "n_routed_experts", "width": "moe_intermediate_size"}
        yield from _experts(model, layer, "mixer.experts", **names, k=latent, projections=("up_proj", "down_proj"))
    else:
        raise ValueError(f"the configuration's layer {layer} is of an unknown kind, {reprlib.repr(kind)}")


_mixtral_experts = functools.partial(_experts, name="block_sparse_moe.experts", projections=("w1", "w3", "w2"))
_TABLE: Sequence[tuple[str, tuple[Callable[[Model, int], Part], ...]]] = (
    ("LlamaForCausalLM MistralForCausalLM Mistral3ForConditionalGeneration", (_attention, _mlp)),
    ("Qwen2ForCausalLM Phi3ForCausalLM", (_attention, _mlp)),
    ("Qwen3ForCausalLM Qwen3VLForConditionalGeneration", (functools.partial(_attention, head_dim=128), _mlp)),
    ("Gemma3ForCausalLM Gemma3ForConditionalGeneration", (functools.partial(_attention, head_dim=256), _mlp)),
    ("Qwen3MoeForCausalLM Qwen3VLMoeForConditionalGeneration", (_attention, _qwen_mlp)),
    ("Qwen3NextForCausalLM", (_gated_or_delta_net, _qwen_mlp)),
    ("Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration", (_gated_or_delta_net, _qwen_mlp)),
    ("MixtralForCausalLM MiniMaxM2ForCausalLM", (_attention, _mixtral_experts)),
    ("GptOssForCausalLM", (_attention, _experts)),
    ("Glm4MoeForCausalLM", (_attention, functools.partial(_first_dense, shared_by_rows=False))),
    ("DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM", (_latent_attention, _first_dense)),
    ("GlmMoeDsaForCausalLM KimiK25ForConditionalGeneration", (_latent_attention, _first_dense)),
    ("Llama4ForCausalLM Llama4ForConditionalGeneration", (_attention, _llama4_mlp)),
    ("NemotronHForCausalLM", (_nemotron_h,)),
)
ARCHITECTURES = {name: parts for names, parts in _TABLE for name in names.split()}
"""By the name in ``config.json``: the parts of a layer, in the order in which they run."""


def architecture(fields: Mapping[str, Any]) -> str:
    """The architecture's name. Raises: ValueError: it is not in the table."""
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"the configuration's architecture {reprlib.repr(name)} is not known; known are {known}")
    return name


def sites(fields: Mapping[str, Any], deployment: Deployment) -> Iterator[tuple[int, Site | ExpertSite]]:
    """The linear layers and the routed experts of each layer of the model, with the layer's number.

    Raises:
        ValueError: the architecture is unknown, a field is missing or bad, or the model cannot be divided like that.
    """
    parts, model = ARCHITECTURES[architecture(fields)], Model(fields, deployment)
    layers = len(_nemotron_kinds(model)) if parts == (_nemotron_h,) else model.number("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise ValueError(f"the configuration's num_hidden_layers must be at most {_MOST_LAYERS}, it is {layers}")
    for layer in range(layers):
        for site in (site for part in parts for site in part(model, layer)):
            for weight, k in [("", site.k)] if isinstance(site, Site) else [(".w13", site.k), (".w2", site.width)]:
                if k < BLOCK_SIZE or k % BLOCK_SIZE:
                    raise ValueError(
                        f"{site.name}{weight} has {k} columns on each rank, which is not a multiple of {BLOCK_SIZE}"
                    )
            yield layer, site
