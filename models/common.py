"""What architecture files share: how they describe a family, the tables of tensor names, shapes, checks of a config.

A *role* is a tensor of the checkpoint, named as in format.md before anything is fused: `token_embd`, `layers.3.attn_q`,
`layers.3.attn_q.bias`. In patterns, `{i}` stands for the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import ModelError, UnsupportedModelError
from .fields import Fields
from .rope import LONG_FACTORS, Scaling

Config = dict[str, Any]


@dataclass(frozen=True)
class Fused:
    """A matrix whose rows are those of several roles: one after the other, or, `by_kv_head`, for each key head its queries,
    the key and the value."""

    parts: tuple[str, ...]
    by_kv_head: bool = False


@dataclass(frozen=True)
class Decoder:
    """An architecture's answer about one checkpoint."""

    # config.json of the packed model.
    config: Config
    # Role patterns that must be there, and that may be.
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    # Divisors of the inverse RoPE frequencies, where a scaling is used.
    rope_scaling: Scaling = field(default_factory=Scaling)
    # Layers with a window have a RoPE of their own (rope_theta_local, rope_mscale_local), which no factors scale.
    local_rope: bool = False
    # Where this checkpoint differs from its architecture: names, and what is fused.
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, Fused] | None = None

    def but(self, *, required: tuple[str, ...] = (), **changes: Any) -> Decoder:
        """The same with other values in `config`, and with more required roles."""
        return replace(self, config={**self.config, **changes}, required=self.required + required)


@dataclass(frozen=True)
class Architecture:
    """Everything the converter must know of one family of models."""

    name: str
    # Names in `general.architecture` of GGUF and in `architectures` of a Hugging Face config.json.
    gguf: tuple[str, ...] = ()
    hf: tuple[str, ...] = ()
    # Metadata and number of tokens to the decoder's hyper-parameters and tensors.
    gguf_config: Callable[[Fields, int], Decoder] | None = None
    hf_config: Callable[[Fields, int], Decoder] | None = None
    # Role pattern to the pattern of the tensor's name; the usual ones where empty.
    gguf_names: Mapping[str, str] = field(default_factory=lambda: GGUF_NAMES)
    hf_names: Mapping[str, str] = field(default_factory=lambda: HF_NAMES)
    # Roles of the checkpoint that are several roles in one: pattern of the last part of the name to those parts.
    fused: Mapping[str, Fused] = field(default_factory=dict)
    # What is to be added to the weights of norms as safetensors have them.
    hf_norm_offset: float = 0.0
    # Rows of safetensors' position_embd before that of position 0.
    hf_positions_offset: int = 0
    # Beginnings of tensor names in safetensors that stand for others, for checkpoints of larger models around the decoder.
    hf_renames: Mapping[str, str] = field(default_factory=dict)
    # Patterns of tensors that carry nothing the decoder needs; `*` stands for anything.
    ignored: tuple[str, ...] = ()
    # The key of config.json under which that of the decoder lies in the checkpoint of a larger model, and the size of the
    # vocabulary where it does not say so.
    hf_nested: str = ""
    hf_vocabulary: int | None = None


# Role to its name in a layer of GGUF and of most Hugging Face checkpoints.
_PER_LAYER = {
    "attn_norm": ("attn_norm", "input_layernorm"),
    "attn_q": ("attn_q", "self_attn.q_proj"),
    "attn_k": ("attn_k", "self_attn.k_proj"),
    "attn_v": ("attn_v", "self_attn.v_proj"),
    "attn_o": ("attn_output", "self_attn.o_proj"),
    "ffn_norm": ("ffn_norm", "post_attention_layernorm"),
    "ffn_gate": ("ffn_gate", "mlp.gate_proj"),
    "ffn_up": ("ffn_up", "mlp.up_proj"),
    "ffn_down": ("ffn_down", "mlp.down_proj"),
    "attn_qkv": ("attn_qkv", "self_attn.qkv_proj"),
    "ffn_gate_up": ("ffn_up", "mlp.gate_up_proj"),
    "q_norm": ("attn_q_norm", "self_attn.q_norm"),
    "k_norm": ("attn_k_norm", "self_attn.k_norm"),
    "post_attn_norm": ("post_attention_norm", "post_attention_layernorm"),
    "post_ffn_norm": ("post_ffw_norm", "post_feedforward_layernorm"),
    "attn_sub_norm": ("attn_sub_norm", "self_attn.attn_sub_norm"),
    "ffn_sub_norm": ("ffn_sub_norm", "mlp.ffn_sub_norm"),
}


def _names(column: int, layer: str, outer: dict[str, str]) -> dict[str, str]:
    table = dict(outer)
    for role, names in _PER_LAYER.items():
        table[f"layers.{{i}}.{role}"] = f"{layer}.{names[column]}.weight"
        table[f"layers.{{i}}.{role}.bias"] = f"{layer}.{names[column]}.bias"
    return table


# The names that most architectures use; a file that differs in one overrides it: {**GGUF_NAMES, role: name}.
GGUF_NAMES: Mapping[str, str] = _names(
    0,
    "blk.{i}",
    {
        "token_embd": "token_embd.weight",
        "output": "output.weight",
        "output_norm": "output_norm.weight",
        "output_norm.bias": "output_norm.bias",
        "rope_factors": "rope_freqs.weight",
        "rope_factors_long": LONG_FACTORS,
    },
)
HF_NAMES: Mapping[str, str] = _names(
    1,
    "model.layers.{i}",
    {
        "token_embd": "model.embed_tokens.weight",
        "output": "lm_head.weight",
        "output_norm": "model.norm.weight",
        "output_norm.bias": "model.norm.bias",
    },
)

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_o")
GATED_FFN = ("ffn_gate", "ffn_up", "ffn_down")
PLAIN_FFN = ("ffn_up", "ffn_down")
PRE_NORMS = ("attn_norm", "ffn_norm")
POST_NORMS = ("post_attn_norm", "post_ffn_norm")
QK_NORMS = ("q_norm", "k_norm")


def in_layers(*names: str, bias: bool = False) -> tuple[str, ...]:
    """Role patterns of these tensors, or of their biases, in every layer."""
    return tuple(f"layers.{{i}}.{name}" + (".bias" if bias else "") for name in names)


def expected_shape(role: str, config: Config, fused: Mapping[str, Fused] | None = None) -> tuple[int, ...]:
    """The shape [rows, cols] or [length] that a role's tensor must have."""
    d, ff, head = config["n_embd"], config["n_ff"], config["head_dim"]
    q, kv = config["n_heads"] * head, config["n_kv_heads"] * head
    full_norm = config.get("qk_norm") == "full"
    name = role.split(".", 2)[2] if role.startswith("layers.") else role
    base = name.removesuffix(".bias")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (config["n_vocab"], d),
        "output": (config["n_vocab"], d),
        "position_embd": (config["n_ctx_train"], d),
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_o": (d, q),
        "ffn_gate": (ff, d),
        "ffn_up": (ff, d),
        "ffn_down": (d, ff),
        "q_norm": (q if full_norm else head,),
        "k_norm": (kv if full_norm else head,),
        "attn_sub_norm": (q,),
        "ffn_sub_norm": (ff,),
        "rope_factors": (int(config.get("rope_dims") or head) // 2,),
        "rope_factors_long": (int(config.get("rope_dims") or head) // 2,),
    }
    if fused and base in fused:
        parts = [shapes[part] for part in fused[base].parts]
        shape: tuple[int, ...] = (sum(part[0] for part in parts), parts[0][1])
    else:
        shape = shapes.get(base, (d,)) if base.endswith("norm") else shapes[base]
    return shape[:1] if name.endswith(".bias") else shape


def part_ranges(fused: Fused, config: Config) -> dict[str, list[tuple[int, int]]]:
    """Where the rows of each part lie in a fused matrix: [begin, end) ranges in order."""
    heights = {part: expected_shape(part, config)[0] for part in fused.parts}
    ranges: dict[str, list[tuple[int, int]]] = {part: [] for part in fused.parts}
    groups = config["n_kv_heads"] if fused.by_kv_head else 1
    at = 0
    for _ in range(groups):
        for part in fused.parts:
            ranges[part].append((at, at + heights[part] // groups))
            at += heights[part] // groups
    return ranges


def check_config(config: Config, where: str) -> None:
    """Raises ModelError where hyper-parameters contradict each other, UnsupportedModelError where the core cannot have them."""

    def need(condition: bool, problem: str) -> None:
        if not condition:
            raise ModelError(f"{where}: {problem}; the file is damaged or made by a faulty converter")

    heads, kv_heads, head_dim = config["n_heads"], config["n_kv_heads"], config["head_dim"]
    need(heads % kv_heads == 0, f"{heads} attention heads cannot share {kv_heads} key-value heads")
    need(head_dim % 2 == 0, f"a head of {head_dim} dimensions is not even")
    if config["rope_style"] != "none":
        need(
            config["rope_dims"] % 2 == 0 and 0 < config["rope_dims"] <= head_dim,
            f"{config['rope_dims']} rotated dimensions do not fit a head of {head_dim}",
        )
    if head_dim % 8 or not 8 <= head_dim <= 1024:
        raise UnsupportedModelError(f"{where}: heads of {head_dim} dimensions are not supported (multiples of 8 are)")
