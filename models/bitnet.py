"""BitNet b1.58: Llama with ternary matrices, a squared ReLU in a gated feed-forward, and norms in front of attn_o and ffn_down."""

from __future__ import annotations

from .common import Architecture, Decoder, in_layers
from .fields import Fields
from .usual import hf_decoder


def hf_config(fields: Fields, n_vocab: int) -> Decoder:
    """Hyper-parameters from a Hugging Face config.json."""
    decoder = hf_decoder(
        fields,
        n_vocab,
        activation=("hidden_act", "relu2"),
        theta=500000.0,
        eps=("rms_norm_eps", 1e-5),
        bias_flags=True,
        roles=in_layers("attn_sub_norm", "ffn_sub_norm"),
    )
    if decoder.config["n_ff"] % 64:
        # Neurons are padded to whole tiles, and ffn_sub_norm would divide by the padded number.
        raise fields.unsupported(
            "intermediate_size", f"is {decoder.config['n_ff']}; BitNet is supported where it is a multiple of 64"
        )
    return decoder


ARCHITECTURE = Architecture(name="bitnet", hf=("BitNetForCausalLM",), hf_config=hf_config)
