"""Turns llama2.c's tiny story model (.bin and SentencePiece model) into a GGUF in F32, exactly."""

from __future__ import annotations

from pathlib import Path

from llama_gguf import LlamaShape, f32_source, sentencepiece_vocabulary, write_llama_gguf
from reference_numpy import load_llama2c


def stories_to_gguf(folder: Path, out: Path) -> Path:
    """`folder` holds stories260K.bin and tok512.model. llama2.c rotates interleaved pairs, as GGUF's Llama does, so no
    row changes its place."""
    m = load_llama2c(folder / "stories260K.bin")
    first = m.layers[0]
    shape = LlamaShape(
        n_layers=len(m.layers),
        n_embd=m.embedding.shape[1],
        n_heads=m.n_heads,
        n_kv_heads=m.n_kv_heads,
        head_dim=m.head_dim,
        n_ff=first.gate.shape[0],
        n_vocab=m.embedding.shape[0],
        tied=m.head is m.embedding,
        n_ctx=512,
        rope_theta=m.theta,
        norm_eps=m.eps,
    )
    sources = [f32_source("token_embd.weight", m.embedding)]
    for i, layer in enumerate(m.layers):
        for name, weight in (
            ("attn_norm", layer.attn_norm),
            ("attn_q", layer.q),
            ("attn_k", layer.k),
            ("attn_v", layer.v),
            ("attn_output", layer.o),
            ("ffn_norm", layer.ffn_norm),
            ("ffn_gate", layer.gate),
            ("ffn_up", layer.up),
            ("ffn_down", layer.down),
        ):
            sources.append(f32_source(f"blk.{i}.{name}.weight", weight))
    sources.append(f32_source("output_norm.weight", m.final_norm))
    if not shape.tied:
        sources.append(f32_source("output.weight", m.head))
    return write_llama_gguf(out, shape, sources, sentencepiece_vocabulary(folder / "tok512.model"), name="stories260K")
