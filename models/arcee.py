"""Arcee AFM: Llama whose feed-forward is a squared ReLU without a gate."""

from __future__ import annotations

from .common import Architecture, Decoder
from .fields import Fields
from .usual import gguf_decoder, hf_decoder


def gguf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from GGUF metadata; `fields` has the prefix `arcee.`."""
    return gguf_decoder(fields, n_vocab, rope_style="interleaved", activation="relu2", gated=False)


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    return hf_decoder(
        fields,
        n_vocab,
        activation=("hidden_act", "relu2"),
        context=4096,
        eps=("rms_norm_eps", 1e-5),
        gated=False,
        bias_flags=True,
    )


ARCHITECTURE = Architecture(
    name="arcee", gguf=("arcee",), hf=("ArceeForCausalLM",), gguf_config=gguf_config, hf_config=hf_config
)
