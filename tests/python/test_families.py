"""What a family's file decides beside the logits: settings that are not known are refused by name, missing parts are named,
images' parts of a checkpoint are left out, tokenizers and templates come along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_gguf import write_family_gguf
from hf_models import engine_logits, randomise, reference_logits, write_tokenizer
from packed_reader import read_packed
from sparse_run import models
from sparse_run.convert import convert
from sparse_run.convert.describe import describe
from sparse_run.errors import ModelError, UnsupportedModelError
from sparse_run.template import ChatTemplate
from sparse_run.tokenizer import Tokenizer
from test_reference_families import BASE, CASES, N_VOCAB, build


def case(name: str) -> Any:
    return next(c for c in CASES if c.name.startswith(name))


def saved(name: str, torch: Any, folder: Path, **config: Any) -> Path:
    """A family's model of the reference tests as a Hugging Face directory, with changes to its config.json."""
    c = case(name)
    build(c, torch).save_pretrained(folder)
    write_tokenizer(folder, N_VOCAB)
    edit(folder, **(c.rename(json.loads((folder / "config.json").read_text())) if c.rename else {}), **config)
    return folder


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def drop_tensors(folder: Path, unwanted: Callable[[str], bool]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if not unwanted(name)}, file, {"format": "pt"})


def test_every_file_is_an_architecture_and_no_name_is_claimed_twice() -> None:
    found = list(models.architectures())
    assert len(found) == len(models.module_names()) > 15
    for kind in ("gguf", "hf"):
        names = [name for a in found for name in getattr(a, kind)]
        assert len(names) == len(set(names))
    for a in found:
        assert bool(a.gguf) == (a.gguf_config is not None) and bool(a.hf) == (a.hf_config is not None), a.name


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("Llama", {"attention_sink_size": 4}, "attention_sink_size is 4, a setting that sparse-run does not know"),
    ("Llama", {"hidden_act": "mish"}, "hidden_act is 'mish', which is not supported"),
    ("Llama", {"num_local_experts": 8}, "mixtures of experts"),
    (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_medium": 7}},
        "beta_medium is 7, a setting",
    ),
    ("Llama", {"architectures": ["SparseLlamaForCausalLM"]}, "without FATReLU"),
    ("Mistral", {"attention_bias": True}, "attention_bias is True, a setting"),
    ("Qwen 2: biases", {"layer_types": ["linear_attention"] * 3}, "'linear_attention', which is not supported"),
    ("Qwen 3", {"layer_types": ["full_attention"]}, "not a list of 3 entries"),
    ("Gemma 3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True; this variant"),
    ("Gemma 3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; this variant"),
    ("OPT", {"do_layer_norm_before": False}, r"\(350m\) is not supported"),
    ("OPT", {"word_embed_proj_dim": 32}, "word_embed_proj_dim is not hidden_size"),
    ("OPT", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
    ("Falcon 7B", {"alibi": True}, "ALiBi"),
    ("Phi-3: fused", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}, "not a list of"),
    ("Granite", {"num_local_experts": 40}, "mixtures of experts"),
    ("OLMo 2", {"clip_qkv": 8.0}, "clip_qkv is 8.0, a setting"),
]


@pytest.mark.parametrize("name, changes, message", REFUSALS, ids=lambda v: str(v)[:30])
def test_what_is_not_known_is_refused_by_name(
    name: str, changes: dict[str, Any], message: str, torch: Any, tmp_path: Path
) -> None:
    folder = saved(name, torch, tmp_path / "hf", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        convert(folder, tmp_path / "packed")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    "changes", [{"unsloth_version": "2025.1"}, {"use_sliding_window": False, "x": None, "y": 0}], ids=str
)
def test_settings_that_switch_nothing_on_are_no_hindrance(changes: dict[str, Any], torch: Any, tmp_path: Path) -> None:
    convert(saved("Llama", torch, tmp_path / "hf", **changes), tmp_path / "packed")


@pytest.mark.parametrize(
    "architecture",
    [
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "MixtralForCausalLM",
        "Llama4ForCausalLM",
        "MambaForCausalLM",
    ],
)
def test_other_architectures_are_refused_by_name(architecture: str, torch: Any, tmp_path: Path) -> None:
    folder = saved("Llama", torch, tmp_path / "hf", architectures=[architecture])
    with pytest.raises(
        UnsupportedModelError, match=f"'{architecture}' is not supported; supported: .*Gemma3ForCausalLM"
    ):
        convert(folder, tmp_path / "packed")


def test_unknown_settings_of_gguf_are_refused_by_name(torch: Any, tmp_path: Path) -> None:
    import gguf

    plain = gguf.GGUFWriter.add_file_type

    def with_setting(self: Any, kind: int) -> None:
        plain(self, kind)
        self.add_float32("llama.attention.sink_scale", 0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_file_type", with_setting)
        write_family_gguf(tmp_path / "m.gguf", "llama", build(case("Llama"), torch))
    with pytest.raises(UnsupportedModelError, match=r"llama.attention.sink_scale is 0.5, a setting"):
        convert(tmp_path / "m.gguf", tmp_path / "packed")


@pytest.mark.parametrize(
    "name, part",
    [
        ("Llama", "self_attn.q_proj.bias"),
        ("Llama", "mlp.gate_proj.bias"),
        ("Qwen 2", "self_attn.k_proj.bias"),
        ("Qwen 3", "self_attn.q_norm.weight"),
        ("Gemma 2", "pre_feedforward_layernorm.weight"),
        ("OPT", "embed_positions.weight"),
        ("Falcon 40B", "ln_mlp.weight"),
        ("Nemotron", "input_layernorm.bias"),
        ("Phi-3: fused", "mlp.gate_up_proj.weight"),
    ],
)
def test_a_missing_part_is_named(name: str, part: str, torch: Any, tmp_path: Path) -> None:
    folder = saved(name, torch, tmp_path / "hf")
    drop_tensors(folder, lambda n: n.endswith(part))
    with pytest.raises(ModelError, match=part):
        convert(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_bias_that_the_configuration_does_not_know_is_no_surprise_at_run_time(torch: Any, tmp_path: Path) -> None:
    folder = saved("Llama", torch, tmp_path / "hf", attention_bias=False)
    with pytest.raises(UnsupportedModelError, match=r"self_attn\.\w_proj\.bias"):
        convert(folder, tmp_path / "packed")


def test_weights_that_are_not_numbers_are_refused(torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("Phi-3: fused", torch, tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.qkv_proj.weight"][70, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="qkv_proj.weight holds weights that are not finite"):
        convert(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("renamed", [False, True], ids=["names on the hub", "names in memory"])
def test_the_text_part_of_gemma_3_with_images(renamed: bool, torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {k: v for k, v in BASE.items() if k != "attn_implementation"}
    text |= {"head_dim": 16, "sliding_window": 20, "query_pre_attn_scalar": 16, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, attn_implementation="eager")
    model = Gemma3ForConditionalGeneration(config).float().eval()
    randomise(model, torch, norm_offset=1.0)
    model.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", N_VOCAB)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert "language_model.model.norm.weight" in tensors and any(name.startswith("vision_tower") for name in tensors)
    if renamed:
        tensors = {
            name.replace("language_model.model.", "model.language_model.").replace(
                "vision_tower.", "model.vision_tower."
            ): t
            for name, t in tensors.items()
        }
        save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "packed")
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, 40).astype(np.int32)
    expected = reference_logits(model, tokens, torch)
    assert np.abs(engine_logits(tmp_path / "packed", tokens, 32) - expected).max() < 1e-3
    facts = describe(tmp_path / "hf")
    assert facts["architecture"] == "gemma3" and facts["window"] == 20


def test_the_room_of_a_session_decides_which_factors_of_longrope_hold(torch: Any, tmp_path: Path) -> None:
    from sparse_run import _core

    model = build(case("Phi-3 128k"), torch)
    folder = saved("Phi-3 128k", torch, tmp_path / "hf")
    convert(folder, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["n_ctx_train"] == 2048 and config["rope_long_context"] == 48 and config["rope_mscale"] > 1
    tokens = np.random.default_rng(3).integers(0, N_VOCAB, 48).astype(np.int32)
    short = reference_logits(model, tokens, torch)
    core = _core.Model(str(tmp_path / "packed"), 1)

    def logits(room: int) -> Any:
        return _core.Session(core, room).eval_all(tokens)

    assert np.abs(logits(48) - short).max() < 1e-3
    # One token of room more, and what is read first is turned as it will be when the context is full.
    assert np.abs(logits(49) - short).max() > 0.05
    np.testing.assert_array_equal(logits(49), logits(2048))
    core.close()


@pytest.mark.parametrize("named", [True, False])
def test_longrope_of_gguf_is_known_by_its_tensors(named: bool, torch: Any, tmp_path: Path) -> None:
    from family_gguf import write_family_gguf

    model = build(case("Phi-3 128k"), torch)
    if not named:  # as the converters of Phi-3 write it
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "default"}
    write_family_gguf(tmp_path / "model.gguf", "phi3", model)
    convert(tmp_path / "model.gguf", tmp_path / "packed")
    tensors, _ = read_packed(tmp_path / "packed")
    np.testing.assert_allclose(tensors["rope_factors_long"], [4.0 + i for i in range(6)])
    np.testing.assert_allclose(tensors["rope_factors"], [1.0 + i / 5 for i in range(6)])
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["rope_long_context"] == 48


class TestTokenizers:
    """Of Hugging Face directories, where they and the embedding must fit together."""

    def test_one_that_is_larger_than_the_embedding_is_refused(self, torch: Any, tmp_path: Path) -> None:
        folder = saved("Llama", torch, tmp_path / "hf")
        write_tokenizer(folder, N_VOCAB + 1)
        with pytest.raises(ModelError, match="has 321 tokens, but the model's embedding 320"):
            convert(folder, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()

    def test_tokens_added_beyond_the_embedding_are_left_out(self, torch: Any, tmp_path: Path) -> None:
        folder = saved("Llama", torch, tmp_path / "hf")
        own = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        tokens = [{"id": 319, "content": "<end>", **own}, {"id": 320, "content": "<image>", **own}]
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if v < 319}
        content["added_tokens"] = tokens
        (folder / "tokenizer.json").write_text(json.dumps(content))
        edit(folder, "generation_config.json", eos_token_id=[319, 320])
        convert(folder, tmp_path / "packed")
        tokenizer = Tokenizer.load(tmp_path / "packed")
        assert tokenizer.find("<image>") is None and tokenizer.find("<end>") == 319
        assert max(tokenizer.encode("a<image>b<end>")) == 319
        assert 319 in tokenizer.eos_ids and 320 not in tokenizer.eos_ids

    def test_tokens_beside_a_sentencepiece_model_become_its_next_ones(
        self, torch: Any, shared_dir: Path, tmp_path: Path
    ) -> None:
        model = shared_dir / "data" / "tokenizers" / "mistral.tokenizer.model.v1"
        folder = saved("Llama", torch, tmp_path / "hf", vocab_size=N_VOCAB)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(model.read_bytes())
        with pytest.raises(ModelError, match="has 32000 tokens, but the model's embedding 320"):
            convert(folder, tmp_path / "packed")
        from sparse_run.tokenizer import export_hf

        (folder / "added_tokens.json").write_text(json.dumps({"<|tool|>": 32002, "<|far|>": 50000}))
        special = {"content": "<|end|>", "special": True}
        edit(folder, "tokenizer_config.json", added_tokens_decoder={"32000": special}, eos_token="<|end|>")
        (tmp_path / "out").mkdir()
        export_hf(folder, tmp_path / "out", 32064)
        tokenizer = Tokenizer.load(tmp_path / "out")
        assert tokenizer.n_vocab == 32003
        ids = tokenizer.encode("Once<|end|>upon<|tool|>", add_bos=False)
        assert 32000 in ids and ids[-1] == 32002 and tokenizer.eos_ids[0] == 32000
        assert tokenizer.is_special(32000) and not tokenizer.is_special(32002)
        assert tokenizer.decode(ids) == "Once upon<|tool|>"

    def test_a_processors_template_and_stop_tokens_of_the_text_part(self, torch: Any, tmp_path: Path) -> None:
        folder = saved("Llama", torch, tmp_path / "hf", eos_token_id=None, text_config={})
        edit(folder, text_config={"eos_token_id": 7})
        edit(folder, "chat_template.json", chat_template="{{ messages[0]['content'] }}!")
        from sparse_run.tokenizer import export_hf

        (tmp_path / "out").mkdir()
        export_hf(folder, tmp_path / "out")
        tokenizer = Tokenizer.load(tmp_path / "out")
        assert 7 in tokenizer.eos_ids
        assert ChatTemplate.for_tokenizer(tokenizer).render([{"role": "user", "content": "Hi"}]) == "Hi!"


FORMATS = {
    "gemma": (
        ["<start_of_turn>", "<end_of_turn>"],
        (
            "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
            "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
        ),
    ),
    "llama3": (
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        (
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|><|start_header_id|>user<|end_header_id|>"
            "\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "granite": (
        ["<|start_of_role|>", "<|end_of_role|>"],
        (
            "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>Ho<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|>Bye<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        ),
    ),
    "mistral": (["[INST]", "[/INST]"], "[INST] Be brief.\n\nHi[/INST] Ho</s>[INST] Bye[/INST]"),
    "phi3": (
        ["<|user|>", "<|assistant|>", "<|end|>"],
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_family_without_a_template_has_its_default(name: str, torch: Any, tmp_path: Path) -> None:
    marks, expected = FORMATS[name]
    folder = saved("Llama", torch, tmp_path / "hf")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if v < N_VOCAB - len(marks)}
    own = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] = [{"id": N_VOCAB - len(marks) + i, "content": m, **own} for i, m in enumerate(marks)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    convert(folder, tmp_path / "packed")
    tokenizer = Tokenizer.load(tmp_path / "packed")
    template = ChatTemplate.for_tokenizer(tokenizer)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Bye"},
    ]
    assert template.render(talk) == expected.replace("</s>", tokenizer.token_text(tokenizer.eos_ids[0]))
