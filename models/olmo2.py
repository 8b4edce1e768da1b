"""OLMo 2 and 3: branches read the residual stream as it is and are normed before they are added; norms of q and k cover all
heads together. OLMo 3 has a window on three layers of four, and scales the rotation of the others only."""

from __future__ import annotations

from dataclasses import replace

from .common import ATTENTION, GATED_FFN, POST_NORMS, QK_NORMS, Architecture, Decoder, in_layers
from .fields import Fields
from .rope import hf_rope
from .usual import GLOBAL, every, gguf_decoder, gguf_windows, hf_decoder, hf_window, hf_windows

ROLES = in_layers(*ATTENTION, *QK_NORMS, *POST_NORMS, *GATED_FFN)


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `olmo2.`."""
    decoder = gguf_decoder(fields, n_vocab, rope_style="half", roles=ROLES)
    layers = decoder.config["n_layers"]
    decoder = decoder.but(
        pre_norms=False,
        qk_norm="full",
        window=gguf_windows(fields, layers, every(4, layers)),
        rope_theta_local=fields.number("rope.freq_base_swa", decoder.config["rope_theta"], low=1.0),
        rope_mscale_local=1.0,
    )
    return replace(decoder, local_rope=True)


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    third = "Olmo3ForCausalLM" in fields.get("architectures", [])
    context = fields.integer("max_position_embeddings", 2048, high=1 << 30)
    heads = fields.integer("num_attention_heads", high=1 << 14)
    head_dim = fields.integer("head_dim", max(1, fields.integer("hidden_size") // heads), high=1 << 14)
    theta = 500000.0 if third else 10000.0
    rope = hf_rope(fields, head_dim, context, theta=theta, layers="full_attention" if third else None)
    decoder = hf_decoder(fields, n_vocab, eps=("rms_norm_eps", 1e-5), rope=rope, bias_flags=True)
    biases = tuple(role for role in decoder.required if role.endswith(".bias"))
    decoder = replace(decoder, required=(*GLOBAL, *ROLES, *biases)).but(pre_norms=False, qk_norm="full")
    if not third:
        return decoder
    local = hf_rope(fields, head_dim, context, theta=theta, layers="sliding_attention", scaled=False)
    if local.scaling.factors is not None or local.dims != rope.dims:
        raise fields.unsupported("rope_parameters", "scales the windowed layers; not supported")
    layers = decoder.config["n_layers"]
    window = hf_window(fields, None if "sliding_window" in fields.values else 4096)
    windows = hf_windows(fields, layers, window, every(4, layers))
    decoder = decoder.but(window=windows, rope_theta_local=local.theta, rope_mscale_local=1.0)
    return replace(decoder, local_rope=True)


ARCHITECTURE = Architecture(
    name="olmo2",
    gguf=("olmo2",),
    hf=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    gguf_config=gguf_config,
    hf_config=hf_config,
)
