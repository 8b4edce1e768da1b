"""Random small models of transformers, saved as they would be published, with a byte-level tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def write_tokenizer(folder: Path, n_vocab: int) -> None:
    """A byte-level tokenizer.json of so many tokens."""
    from llama_gguf import byte_to_unicode

    tokens = [*byte_to_unicode(), *(f"<x{i}>" for i in range(n_vocab - 256))]
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": True,
                },
                "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
                "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
            }
        ),
        encoding="utf-8",
    )


def randomise(model: Any, torch: Any, *, norm_offset: float = 0.0, seed: int = 1234) -> None:
    """Weights as a trained model has them: activations stay at order 1, attention is far from uniform, biases and norms
    matter. `norm_offset` is what the family adds to the weights of norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.dim() == 1 and not name.endswith("bias"):
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5 - norm_offset)
            elif p.dim() == 1:
                p.copy_(draw * 0.3)
            else:
                width = 1.2 if any(part in name for part in ("q_proj", "k_proj", "qkv", "query")) else 0.5
                p.copy_(draw * width / math.sqrt(p.shape[-1]))


def reference_logits(model: Any, tokens: NDArray[Any], torch: Any, *, half_cache: bool = True) -> NDArray[np.float32]:
    """Logits of all tokens, float32 [n, n_vocab]; keys and values rounded to float16 as the engine's cache holds them."""
    from transformers import DynamicCache

    class HalfCache(DynamicCache):  # type: ignore[misc]
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            return super().update(key_states.half().float(), value_states.half().float(), *args, **kwargs)

    cache = HalfCache() if half_cache else DynamicCache()
    with torch.no_grad():
        out = model(torch.from_numpy(tokens.astype(np.int64))[None], past_key_values=cache, use_cache=True)
    return np.asarray(out.logits[0].float().numpy())


def engine_logits(packed: Path, tokens: NDArray[np.int32], prompt: int, threads: int = 2) -> NDArray[np.float32]:
    """Logits of all tokens, the first `prompt` evaluated together, the others one by one."""
    from sparse_run import _core

    model = _core.Model(str(packed), threads)
    session = _core.Session(model, len(tokens))
    got = [session.eval_all(tokens[:prompt])]
    for i in range(prompt, len(tokens)):
        session.eval(tokens[i : i + 1])
        got.append(np.array(session.logits())[None])
    model.close()
    return np.concatenate(got)
