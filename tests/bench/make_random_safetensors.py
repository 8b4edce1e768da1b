#!/usr/bin/env python3
"""Makes a Hugging Face directory of the Llama architecture with random weights, in shards, for timing conversions.

    make_random_safetensors.py OUT_DIR --type bf16

TinyLlama's widths with nine layers: 1.05 GB. Tensor by tensor, rows at a time: no matrix is ever held whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from hf_models import write_tokenizer

SHARDS = 3
N_EMBD, N_FF, N_KV, N_VOCAB = 2048, 5632, 256, 32000
TYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


def tensors(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights, as transformers has them."""
    out: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (N_VOCAB, N_EMBD))]
    for i in range(layers):
        p = f"model.layers.{i}."
        out += [
            (p + "input_layernorm.weight", (N_EMBD,)),
            (p + "self_attn.q_proj.weight", (N_EMBD, N_EMBD)),
            (p + "self_attn.k_proj.weight", (N_KV, N_EMBD)),
            (p + "self_attn.v_proj.weight", (N_KV, N_EMBD)),
            (p + "self_attn.o_proj.weight", (N_EMBD, N_EMBD)),
            (p + "post_attention_layernorm.weight", (N_EMBD,)),
            (p + "mlp.gate_proj.weight", (N_FF, N_EMBD)),
            (p + "mlp.up_proj.weight", (N_FF, N_EMBD)),
            (p + "mlp.down_proj.weight", (N_EMBD, N_FF)),
        ]
    return [*out, ("model.norm.weight", (N_EMBD,)), ("lm_head.weight", (N_VOCAB, N_EMBD))]


def stored(values: NDArray[np.float32], kind: str) -> bytes:
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if kind == "F16" else "<f4").tobytes()


def write_shard(path: Path, part: list[tuple[str, tuple[int, ...]]], kind: str, seed: int) -> None:
    size = 4 if kind == "F32" else 2
    header, at = {}, 0
    for name, shape in part:
        nbytes = int(np.prod(shape)) * size
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for index, (_, shape) in enumerate(part):
            rng = np.random.default_rng([seed, index])
            if len(shape) == 1:
                file.write(stored(rng.uniform(0.8, 1.2, shape).astype(np.float32), kind))
                continue
            for row in range(0, shape[0], 1024):
                draw = rng.standard_normal((min(1024, shape[0] - row), shape[1]), dtype=np.float32)
                file.write(stored(draw * np.float32(shape[1] ** -0.5), kind))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=sorted(TYPES), default="bf16")
    parser.add_argument("--layers", type=int, default=9)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    everything = tensors(args.layers)
    each = -(-len(everything) // SHARDS)
    places = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = everything[shard * each : (shard + 1) * each]
        write_shard(args.out / name, part, TYPES[args.type], shard)
        places.update({tensor: name for tensor, _ in part})
    (args.out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": N_EMBD,
        "intermediate_size": N_FF, "num_hidden_layers": args.layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "vocab_size": N_VOCAB,
    }  # fmt: skip
    (args.out / "config.json").write_text(json.dumps(config))
    write_tokenizer(args.out, N_VOCAB)


if __name__ == "__main__":
    main()
