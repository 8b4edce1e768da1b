"""Qwen 3: Llama with norms on every head of q and k, and an optional window on the upper layers."""

from __future__ import annotations

from .common import ATTENTION, GATED_FFN, PRE_NORMS, QK_NORMS, Architecture, Decoder, in_layers
from .fields import Fields
from .qwen2 import hf_upper_windows
from .usual import gguf_decoder, hf_decoder


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `qwen3.`."""
    roles = in_layers(*PRE_NORMS, *ATTENTION, *QK_NORMS, *GATED_FFN)
    return gguf_decoder(fields, n_vocab, rope_style="half", roles=roles)


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    decoder = hf_decoder(
        fields, n_vocab, context=32768, head_dim=128, kv_heads=32, bias_flags=True, roles=in_layers(*QK_NORMS)
    )
    return decoder.but(window=hf_upper_windows(fields, decoder.config["n_layers"]))


ARCHITECTURE = Architecture(
    name="qwen3", gguf=("qwen3",), hf=("Qwen3ForCausalLM",), gguf_config=gguf_config, hf_config=hf_config
)
