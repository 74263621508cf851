"""The models whose decode steps are measured: the fields of their published ``config.json`` that ``sites`` needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from safealloc.commands.plan import architectures
from safealloc.commands.plan.architectures import ExpertSite, Site
from safealloc.commands.plan.deployment import Deployment
from safealloc.formats.layout import SfLayout

NORM, SILU, ATTENTION = "RMSNorm", "SiLU and mul", "attention"
"""What writes the input of a linear layer."""


def producer(site: Site) -> str:
    """What writes the input of a linear layer, by its name in vLLM."""
    if site.name.endswith("down_proj"):
        return SILU
    return ATTENTION if site.name.endswith("o_proj") else NORM


@dataclass(frozen=True, slots=True)
class Model:
    """A model on one tensor-parallel rank.

    Attributes:
        name: as it was published.
        tensor_parallel: ranks that a layer is split over.
        sites: linear layers and routed experts of a decode step.
    """

    name: str
    tensor_parallel: int
    sites: tuple[Site | ExpertSite, ...]

    @property
    def title(self) -> str:
        """For tables, progress and pictures."""
        return f"{self.name}, TP {self.tensor_parallel}"

    @property
    def linears(self) -> tuple[Site, ...]:
        """Sites without routed experts."""
        return tuple(site for site in self.sites if isinstance(site, Site))

    @property
    def step(self) -> list[tuple[Site | ExpertSite, int]]:
        """The sites of a decode step in the order they run, each with its number within its site."""
        runs = sorted(
            (layer, place, number) for place, site in enumerate(self.sites) for number, layer in enumerate(site.layers)
        )
        return [(self.sites[place], number) for _, place, number in runs]

    @property
    def quantizations(self) -> int:
        """Of a step: one at a linear layer, two at routed experts, before w13 and before w2."""
        return sum(len(site.layers) * (2 if isinstance(site, ExpertSite) else 1) for site in self.sites)

    @property
    def weight_nbytes(self) -> int:
        """Bytes that a step reads of linear layers' weights and their scales, without routed experts."""
        return sum(len(site.layers) * weight_nbytes(site) for site in self.linears)


def weight_nbytes(site: Site) -> int:
    """Bytes of one NVFP4 weight of a site, its scales included."""
    return site.n * site.k // 2 + SfLayout.layout_128x4.nbytes(site.n, site.k)


def model(name: str, fields: Mapping[str, Any], tensor_parallel: int) -> Model:
    """The model with these fields of ``config.json``."""
    layers: dict[Site | ExpertSite, list[int]] = {}
    for layer, site in architectures.sites(fields, Deployment((), tensor_parallel)):
        layers.setdefault(site, []).append(layer)
    sites = (replace(site, layers=tuple(numbers)) for site, numbers in layers.items())
    return Model(name, tensor_parallel, tuple(sites))


LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
}
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
}
QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 64,
}
DEEPSEEK_R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}

MODELS = (
    model("Llama 3.1 8B", LLAMA_8B, 1),
    model("Llama 3.1 8B", LLAMA_8B, 8),
    model("Llama 3.3 70B", LLAMA_70B, 1),
    model("Llama 3.3 70B", LLAMA_70B, 8),
    model("Qwen3 32B", QWEN3_32B, 1),
    model("Qwen3 32B", QWEN3_32B, 8),
    model("DeepSeek-R1", DEEPSEEK_R1, 1),
    model("DeepSeek-R1", DEEPSEEK_R1, 8),
)
"""Every linear layer and expert counts as NVFP4; a published checkpoint may keep some in another type."""
