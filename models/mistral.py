"""Mistral and Ministral as transformers stores them: Llama with an attention window. Their GGUF files are of the kind `llama`."""

from __future__ import annotations

from .common import Architecture, Decoder
from .fields import Fields
from .usual import hf_decoder, hf_window, hf_windows


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json. A window of null is none; one that is missing is 4096."""
    decoder = hf_decoder(fields, n_vocab, context=4096 * 32, kv_heads=8)
    layers = decoder.config["n_layers"]
    window = hf_window(fields, None if "sliding_window" in fields.values else 4096)
    if "MinistralForCausalLM" not in fields.get("architectures", []):
        return decoder.but(window=[window or 0] * layers)
    return decoder.but(window=hf_windows(fields, layers, window, [window is not None] * layers))


ARCHITECTURE = Architecture(name="mistral", hf=("MistralForCausalLM", "MinistralForCausalLM"), hf_config=hf_config)
