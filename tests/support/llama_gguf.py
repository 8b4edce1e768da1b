"""Writes GGUF files of the Llama architecture for tests and benchmarks, tensor by tensor, so that memory stays bounded.

The file is what llama.cpp's converter would write for the same weights: its tensor names, its order of q and k rows
(`permute_qk`), its metadata and its tokenizers (byte-level BPE or SentencePiece).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class LlamaShape:
    """Hyper-parameters of a Llama-architecture model; `head_dim * n_heads` need not be `n_embd`."""

    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ff: int
    n_vocab: int
    tied: bool = True
    n_ctx: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes [outputs, inputs] of all weights, in the order of use."""
        q, kv, d = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, self.n_embd
        out: list[tuple[str, tuple[int, ...]]] = [("token_embd.weight", (self.n_vocab, d))]
        for i in range(self.n_layers):
            out += [
                (f"blk.{i}.attn_norm.weight", (d,)),
                (f"blk.{i}.attn_q.weight", (q, d)),
                (f"blk.{i}.attn_k.weight", (kv, d)),
                (f"blk.{i}.attn_v.weight", (kv, d)),
                (f"blk.{i}.attn_output.weight", (d, q)),
                (f"blk.{i}.ffn_norm.weight", (d,)),
                (f"blk.{i}.ffn_gate.weight", (self.n_ff, d)),
                (f"blk.{i}.ffn_up.weight", (self.n_ff, d)),
                (f"blk.{i}.ffn_down.weight", (d, self.n_ff)),
            ]
        out.append(("output_norm.weight", (d,)))
        if not self.tied:
            out.append(("output.weight", (self.n_vocab, d)))
        return out


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF stores it."""

    model: str
    tokens: list[str]
    types: list[int]
    bos: int
    eos: int
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    pre: str = "gpt-2"
    add_bos: bool = False
    unk: int | None = None


@dataclass(frozen=True)
class TensorSource:
    """One tensor: its ggml type and a function that makes its array when its turn comes.

    `make()` returns float32 [shape] for F32, float16 for F16, and for quantised types the raw bytes
    uint8 [rows, bytes of a row]; `nbytes` is known beforehand because GGUF lists all tensors before the data.
    """

    name: str
    shape: tuple[int, ...]
    qtype: Any
    nbytes: int
    make: Callable[[], NDArray[Any]]


def byte_to_unicode() -> list[str]:
    """The printable character that GPT-2's byte-level BPE uses for each byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table, extra = [""] * 256, 0
    for b in range(256):
        if b in plain:
            table[b] = chr(b)
        else:
            table[b] = chr(256 + extra)
            extra += 1
    return table


def byte_level_vocabulary(n_vocab: int) -> Vocabulary:
    """A small working byte-level BPE: the bytes, a few merges, BOS and EOS, the rest reserved tokens."""
    merges = ["Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "e n", "n d", "Ġa nd", "in g"]
    if n_vocab < 256 + len(merges) + 2:
        raise ValueError(f"a byte-level vocabulary needs at least {256 + len(merges) + 2} tokens, not {n_vocab}")
    tokens = byte_to_unicode() + [m.replace(" ", "") for m in merges]
    types = [NORMAL] * len(tokens)
    bos, eos = len(tokens), len(tokens) + 1
    tokens += ["<|begin|>", "<|end|>"]
    types += [CONTROL, CONTROL]
    rest = n_vocab - len(tokens)
    tokens += [f"<|reserved_{i}|>" for i in range(rest)]
    types += [UNUSED] * rest
    return Vocabulary("gpt2", tokens, types, bos, eos, merges=merges)


def sentencepiece_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a SentencePiece model file, as llama.cpp's converter stores it."""
    from sentencepiece import SentencePieceProcessor

    sp = SentencePieceProcessor(model_file=str(path))
    tokens, scores, types = [], [], []
    for i in range(sp.vocab_size()):
        tokens.append(sp.id_to_piece(i))
        scores.append(float(sp.get_score(i)))
        types.append(
            UNKNOWN if sp.is_unknown(i) else CONTROL if sp.is_control(i) else BYTE if sp.is_byte(i) else NORMAL
        )
    return Vocabulary(
        "llama", tokens, types, sp.bos_id(), sp.eos_id(), scores=scores, pre="default", add_bos=True, unk=sp.unk_id()
    )


def permute_qk(weight: NDArray[Any], n_heads: int) -> NDArray[Any]:
    """Rows of a q or k matrix from the half-split order of transformers to the interleaved order of GGUF's Llama."""
    rows = weight.shape[0]
    split = weight.reshape(n_heads, 2, rows // n_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weight.shape))


def f32_source(name: str, values: NDArray[Any]) -> TensorSource:
    """A float32 tensor that is in memory already."""
    import gguf

    array = np.ascontiguousarray(values, dtype=np.float32)
    return TensorSource(name, array.shape, gguf.GGMLQuantizationType.F32, array.nbytes, lambda: array)


def write_llama_gguf(
    path: Path,
    shape: LlamaShape,
    tensors: Sequence[TensorSource],
    vocabulary: Vocabulary,
    *,
    name: str = "test",
    chat_template: str | None = None,
) -> Path:
    """Writes the file; only one tensor is in memory at a time (more where a source already holds its array)."""
    import gguf

    if len(vocabulary.tokens) != shape.n_vocab:
        raise ValueError(f"the vocabulary has {len(vocabulary.tokens)} tokens, the model {shape.n_vocab}")
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name(name)
    w.add_block_count(shape.n_layers)
    w.add_context_length(shape.n_ctx)
    w.add_embedding_length(shape.n_embd)
    w.add_feed_forward_length(shape.n_ff)
    w.add_head_count(shape.n_heads)
    w.add_head_count_kv(shape.n_kv_heads)
    w.add_key_length(shape.head_dim)
    w.add_value_length(shape.head_dim)
    w.add_layer_norm_rms_eps(shape.norm_eps)
    w.add_rope_dimension_count(shape.head_dim)
    w.add_rope_freq_base(shape.rope_theta)
    w.add_vocab_size(shape.n_vocab)
    w.add_tokenizer_model(vocabulary.model)
    w.add_tokenizer_pre(vocabulary.pre)
    w.add_token_list(vocabulary.tokens)
    w.add_token_types(vocabulary.types)
    if vocabulary.scores:
        w.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        w.add_token_merges(vocabulary.merges)
    w.add_bos_token_id(vocabulary.bos)
    w.add_eos_token_id(vocabulary.eos)
    if vocabulary.unk is not None:
        w.add_unk_token_id(vocabulary.unk)
    w.add_add_bos_token(vocabulary.add_bos)
    if chat_template is not None:
        w.add_chat_template(chat_template)
    for t in tensors:
        # For quantised types the writer wants the shape of the bytes and derives the logical one.
        quantised = t.qtype not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        if quantised:
            dims: tuple[int, ...] = (t.shape[0], t.nbytes // t.shape[0])
            dtype = np.dtype(np.uint8)
        else:
            dims = t.shape
            dtype = np.dtype(np.float32 if t.qtype == gguf.GGMLQuantizationType.F32 else np.float16)
        w.add_tensor_info(t.name, dims, dtype, t.nbytes, raw_dtype=t.qtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for t in tensors:
        w.write_tensor_data(t.make())
    w.close()
    return path
