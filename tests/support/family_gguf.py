"""Writes a transformers model as the GGUF file that llama.cpp's converter would make of it.

Names come from the gguf package's own tables; what llama.cpp's converter does to weights and writes as metadata is written
down here from its source, family by family, so that nothing is shared with the architectures under test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_gguf import byte_level_vocabulary, permute_qk
from numpy.typing import NDArray

Array = NDArray[Any]
Weights = dict[str, Array]


def write_family_gguf(path: Path, family: str, model: Any) -> Path:
    """`family` is the name in `general.architecture`."""
    import gguf

    config = _plain_config(model)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(arch, layers)
    w = gguf.GGUFWriter(str(path), family)
    w.add_name("test")
    _usual_metadata(w, config)
    weights = {name: p.detach().float().numpy() for name, p in model.state_dict().items()}
    if config.get("tie_word_embeddings", True):
        weights.pop("lm_head.weight", None)
    weights = _FAMILIES[family](w, config, weights)
    _tokenizer(w, config["vocab_size"])
    for name, values in weights.items():
        stored = name if name.startswith(("blk.", "rope_")) else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ValueError(f"{name} has no name in GGUF for {family}")
        w.add_tensor(stored, np.ascontiguousarray(values, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _plain_config(model: Any) -> dict[str, Any]:
    """config.json as a dictionary."""
    config: dict[str, Any] = model.config.to_dict()
    return config


def _usual_metadata(w: Any, c: dict[str, Any]) -> None:
    """What TextModel.set_gguf_parameters writes for every family."""
    w.add_block_count(c["num_hidden_layers"])
    if "max_position_embeddings" in c:
        w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c.get("intermediate_size") or c.get("ffn_hidden_size") or 4 * c["hidden_size"])
    w.add_head_count(c["num_attention_heads"])
    if c.get("num_key_value_heads"):
        w.add_head_count_kv(c["num_key_value_heads"])
    rope = c.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        import gguf

        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        import gguf

        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(rope["factor"])
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "longrope":
        import gguf

        w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    if "rope_theta" in rope:
        w.add_rope_freq_base(rope["rope_theta"])
    local = (c.get("rope_parameters") or {}).get("sliding_attention")
    if local:
        w.add_rope_freq_base_swa(local["rope_theta"])
    if "rms_norm_eps" in c:
        w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    if "layer_norm_epsilon" in c:
        w.add_layer_norm_eps(c["layer_norm_epsilon"])
    if c.get("head_dim"):
        w.add_key_length(c["head_dim"])
        w.add_value_length(c["head_dim"])
    w.add_file_type(0)


def _tokenizer(w: Any, n_vocab: int) -> None:
    vocabulary = byte_level_vocabulary(n_vocab)
    w.add_tokenizer_model(vocabulary.model)
    w.add_tokenizer_pre(vocabulary.pre)
    w.add_token_list(vocabulary.tokens)
    w.add_token_types(vocabulary.types)
    w.add_token_merges(vocabulary.merges)
    w.add_bos_token_id(vocabulary.bos)
    w.add_eos_token_id(vocabulary.eos)
    w.add_add_bos_token(False)


def _head_dim(c: dict[str, Any]) -> int:
    dim: int = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    return dim


def _permuted(c: dict[str, Any], weights: Weights) -> Weights:
    """LlamaModel: rows of q and k so that rotated pairs are neighbours, biases too."""
    kv = c.get("num_key_value_heads") or c["num_attention_heads"]
    out = {}
    for name, values in weights.items():
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            values = permute_qk(values, c["num_attention_heads"])
        elif name.endswith(("k_proj.weight", "k_proj.bias")):
            values = permute_qk(values, kv)
        out[name] = values
    return out


def _norms_plus_one(weights: Weights) -> Weights:
    return {name: values + 1 if name.endswith("norm.weight") else values for name, values in weights.items()}


def _llama(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    w.add_vocab_size(c["vocab_size"])
    w.add_rope_dimension_count(_head_dim(c))
    weights = _permuted(c, weights)
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        weights["rope_freqs.weight"] = _llama3_factors(rope, _head_dim(c))
    return weights


def _llama3_factors(rope: dict[str, Any], dims: int) -> Array:
    """LlamaModel.generate_extra_tensors."""
    original, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, dims, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / dims)
        smooth = (original / wavelength - low) / (high - low)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    assert 1 < len(set(factors)) and max(factors) == rope["factor"], "all three ranges are wanted"
    return np.asarray(factors, np.float32)


def _as_it_is(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    return weights


def _gemma(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    return _norms_plus_one(weights)


def _gemma2(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    w.add_attn_logit_softcapping(c["attn_logit_softcapping"])
    w.add_final_logit_softcapping(c["final_logit_softcapping"])
    w.add_sliding_window(c["sliding_window"])
    return _norms_plus_one(weights)


def _gemma3(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    if c.get("final_logit_softcapping"):
        w.add_final_logit_softcapping(c["final_logit_softcapping"])
    w.add_sliding_window(c["sliding_window"])
    return _norms_plus_one(weights)


def _phi3(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    rope = c["rope_parameters"]
    original = rope.get("original_max_position_embeddings", c["max_position_embeddings"])
    dims = int(rope.get("partial_rotary_factor", 1.0) * _head_dim(c))
    w.add_rope_scaling_orig_ctx_len(original)
    w.add_rope_dimension_count(dims)
    w.add_sliding_window(c["sliding_window"] or 0)
    if rope.get("long_factor"):
        scale = c["max_position_embeddings"] / original
        w.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(original))))
        weights["rope_factors_long.weight"] = np.asarray(rope["long_factor"], np.float32)
        weights["rope_factors_short.weight"] = np.asarray(rope["short_factor"], np.float32)
    return weights


def _falcon(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    heads, head_dim = c["num_attention_heads"], _head_dim(c)
    kv = c["num_kv_heads"] if c["new_decoder_architecture"] else 1
    w.add_tensor_data_layout("jploski")
    w.add_head_count_kv(kv)
    out = {}
    for name, values in weights.items():
        if "query_key_value" in name:
            qkv = values.reshape(kv, heads // kv + 2, head_dim, -1)
            parts = (qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]])
            values = np.concatenate([part.reshape(-1, qkv.shape[-1]) for part in parts])
        out[name] = values
    return out


def _granite(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    w.add_attention_scale(c["attention_multiplier"])
    w.add_embedding_scale(c["embedding_multiplier"])
    w.add_residual_scale(c["residual_multiplier"])
    w.add_logit_scale(c["logits_scaling"])
    return _llama(w, c, weights)


def _minicpm(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    """From a Granite model whose scores are scaled as usual."""
    w.add_embedding_scale(c["embedding_multiplier"])
    w.add_residual_scale(c["residual_multiplier"])
    w.add_logit_scale(c["logits_scaling"])
    return _permuted(c, weights)


def _olmo2(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    if "sliding_window" in c:
        w.add_sliding_window(c["sliding_window"])
        w.add_sliding_window_pattern([kind == "sliding_attention" for kind in c["layer_types"]])
    return weights


def _nemotron(w: Any, c: dict[str, Any], weights: Weights) -> Weights:
    import gguf

    w.add_vocab_size(c["vocab_size"])
    w.add_layer_norm_eps(c["norm_eps"])
    w.add_rope_dimension_count(int(c["rope_parameters"]["partial_rotary_factor"] * _head_dim(c)))
    w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    return _norms_plus_one(weights)


_FAMILIES: dict[str, Callable[[Any, dict[str, Any], Weights], Weights]] = {
    "llama": _llama,
    "arcee": _llama,
    "smollm3": _llama,
    "qwen2": _as_it_is,
    "qwen3": _as_it_is,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "falcon": _falcon,
    "granite": _granite,
    "minicpm": _minicpm,
    "olmo2": _olmo2,
    "nemotron": _nemotron,
}
