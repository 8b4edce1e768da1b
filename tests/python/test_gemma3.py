"""Gemma 3 270M in Q4_K_M, a real model of a second family: tied embeddings of 262,144 tokens, windows, two rotations, four
norms a layer. Golden texts, distributions and perplexity against independent references; its tokenizer.

The golden tokens are llama.cpp's; transformers, on the weights that the gguf package decodes, must choose the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from sparse_run import _core
from sparse_run.tokenizer import Tokenizer

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[1] / "golden" / "gemma3.json").read_text(encoding="utf-8")
)
LLAMA_CPP_PERPLEXITY = 19.008  # ctx 512, the first 20 chunks of wikitext-2's test set


def log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def tokenizer(gemma3_packed: Path) -> Tokenizer:
    return Tokenizer.load(gemma3_packed)


@pytest.fixture(scope="module")
def reference(gemma3_gguf: Path, need: Callable[[str], NoReturn]) -> Any:
    """Gemma 3 in transformers with the file's weights, float32."""
    try:
        import gguf
        import torch
        import transformers
    except ImportError as error:
        need(f"{error.name} is not installed: pip install torch transformers gguf")
    file = gguf.GGUFReader(str(gemma3_gguf))

    def key(name: str) -> Any:
        return file.get_field(f"gemma3.{name}").contents()

    layers = key("block_count")
    config = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=key("attention.head_count_kv"),
        head_dim=key("attention.key_length"),
        sliding_window=key("attention.sliding_window"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        query_pre_attn_scalar=key("attention.key_length"),
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(config)
    model = model.to_empty(device="cpu").float().eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, layers)
    stored = {t.name: t for t in file.tensors}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "lm_head.weight":
                continue
            tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            p.copy_(torch.from_numpy(np.array(values - 1 if name.endswith("norm.weight") else values)))
        model.tie_weights()
        # Buffers have no values after to_empty: the rotations and the embedding's factor are made anew.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
        model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return model


def reference_logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda e: e["prompt"][:20])
def test_golden_text(entry: dict[str, Any], gemma3_packed: Path, reference: Any, tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(entry["prompt"]) == entry["prompt_tokens"]
    ids, tokens = entry["prompt_tokens"], entry["tokens"]
    logits = reference_logits(reference, ids + tokens)[len(ids) - 1 : -1]
    assert logits.argmax(axis=-1).tolist() == tokens, "the reference chooses other tokens than those stored"
    ordered = np.sort(logits, axis=-1)
    leads = ordered[:, -1] - ordered[:, -2]
    assert leads.min() > 0.2, f"{leads}: a choice this close proves nothing; take another prompt"

    model = _core.Model(str(gemma3_packed), 2)
    session = _core.Session(model, 256)
    session.eval(np.asarray(ids, dtype=np.int32))
    sampler = _core.Sampler(temperature=0.0)
    assert [session.step(sampler) for _ in tokens] == tokens
    model.close()
    stream = tokenizer.stream()
    assert "".join(map(stream.push, tokens)) + stream.finish() == entry["text"]


def test_distributions_beyond_the_window_are_those_of_the_reference(
    gemma3_packed: Path, reference: Any, tokenizer: Tokenizer, shared_dir: Path
) -> None:
    """700 tokens of text: the windows are 512. The engine's 8-bit activations may cost a little; wrong windows, rotations,
    scales or norms cost far more (without windows: a mean divergence of 0.05 after token 512)."""
    text = (shared_dir / "data" / "text" / "wikitext-2.test.raw").read_text(encoding="utf-8")[:4000]
    ids = tokenizer.encode(text)[:700]
    assert len(ids) == 700
    expected = log_softmax(reference_logits(reference, ids))
    model = _core.Model(str(gemma3_packed), 2)
    actual = log_softmax(_core.Session(model, len(ids)).eval_all(np.asarray(ids, dtype=np.int32)))
    model.close()
    divergence = (np.exp(expected) * (expected - actual)).sum(axis=-1)
    agreement = (expected.argmax(axis=-1) == actual.argmax(axis=-1)).mean()
    beyond = divergence[512:]
    print(f"KL {divergence.mean():.4f}, beyond the window {beyond.mean():.4f}, agreement {agreement:.3f}")
    assert divergence.mean() < 0.01 and beyond.mean() < 0.01
    assert agreement > 0.93


def test_perplexity_is_that_of_llama_cpp(gemma3_packed: Path, shared_dir: Path, run_cli: Callable[..., Any]) -> None:
    text = shared_dir / "data" / "text" / "wikitext-2.test.raw"
    done = run_cli("eval", "-m", gemma3_packed, "--text", text, "--ctx", 512, "--chunks", 20, "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(LLAMA_CPP_PERPLEXITY, rel=0.005)


def test_tokenizer_gives_the_ids_of_llama_cpp(tokenizer: Tokenizer, shared_dir: Path) -> None:
    base = shared_dir / "data" / "tokenizers" / "vectors" / "ggml-vocab-gemma-4.gguf"
    texts = Path(f"{base}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{base}.out").read_text(encoding="utf-8").splitlines()
    assert len(texts) == len(lines)
    for text, line in zip(texts, lines):
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == [int(word) for word in line.split()], repr(text)


def test_control_tokens_are_found_wherever_they_stand(tokenizer: Tokenizer) -> None:
    start, end = tokenizer.find("<start_of_turn>"), tokenizer.find("<end_of_turn>")
    assert start is not None and end is not None and end in tokenizer.eos_ids
    ids = tokenizer.encode("<start_of_turn>user\n<<end_of_turn><start_of_turn", add_bos=False)
    assert ids[0] == start and ids.count(end) == 1 and ids.count(start) == 1
    assert tokenizer.decode(ids, skip_special=False) == "<start_of_turn>user\n<<end_of_turn><start_of_turn"
    plain = tokenizer.encode("<start_of_turn>", add_bos=False, parse_special=False)
    assert start not in plain and tokenizer.decode(plain) == "<start_of_turn>"
