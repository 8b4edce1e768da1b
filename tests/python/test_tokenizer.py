"""Tokenizers against the ids of other implementations: llama.cpp's vectors, llama.cpp with GPT-2's vocabulary
under every pre-tokenizer (tests/golden/pretokenizers.json), the checkpoint's own tokenizer.json, and SentencePiece itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_run.convert.gguf_reader import GgufFile
from sparse_run.errors import ModelError, UnsupportedModelError
from sparse_run.tokenizer import Tokenizer, export_gguf, export_hf
from sparse_run.tokenizer.pretokenizers import names
from sparse_run.tokenizer.sentencepiece_model import CONTROL, read_model
from sparse_run.tokenizer.tokenizer import byte_alphabet

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "pretokenizers.json").read_text(encoding="utf-8"))
SEPARATOR = "\n__ggml_vocab_test__\n"
CHATML_END = "<|im_end|>"

Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def data(shared_dir: Path) -> Path:
    return shared_dir / "data"


@pytest.fixture(scope="module")
def smollm2_json(data: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((data / "tokenizers" / "smollm2_tokenizer.notrunc.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2_json: dict[str, Any]) -> Metadata:
    """What SmolLM2's GGUF says about its tokenizer, from the vocabulary of its tokenizer.json."""
    vocabulary = smollm2_json["model"]["vocab"]
    special = {added["id"] for added in smollm2_json["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(vocabulary))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in smollm2_json["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def built(metadata: Metadata, folder: Path, **changes: Any) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    export_gguf({**metadata, **changes}, folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def smollm2(smollm2_metadata: Metadata, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return built(smollm2_metadata, tmp_path_factory.mktemp("smollm2-tokenizer"))


@pytest.fixture(scope="module")
def llama(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with GgufFile(data / "tokenizers" / "vectors" / "ggml-vocab-llama-spm.gguf") as file:
        return built(dict(file.metadata), tmp_path_factory.mktemp("llama-tokenizer"))


@pytest.fixture(scope="module")
def mistral(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """tokenizer.model of a Hugging Face folder."""
    source, out = tmp_path_factory.mktemp("mistral"), tmp_path_factory.mktemp("mistral-tokenizer")
    (source / "tokenizer.model").write_bytes((data / "tokenizers" / "mistral.tokenizer.model.v1").read_bytes())
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    export_hf(source, out)
    return Tokenizer.load(out)


# The other vectors are in test_vocabularies.py, whose vocabularies are fetched. Phi-3's is Llama's, plus special tokens.
VOCABULARY = {"gpt-2": "gpt-2", "llama-spm": "llama-spm", "phi-3": "llama-spm"}


@pytest.mark.parametrize("name", VOCABULARY)
def test_llamacpp_vectors_are_met(name: str, data: Path, tmp_path: Path) -> None:
    folder = data / "tokenizers" / "vectors"
    texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split(SEPARATOR)
    wanted = [
        [int(i) for i in line.split()] for line in (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    ]
    with GgufFile(folder / f"ggml-vocab-{VOCABULARY[name]}.gguf") as file:
        tokenizer = built(dict(file.metadata), tmp_path)
    assert len(texts) == 47 and len(wanted) >= len(texts)
    for text, ids in zip(texts, wanted, strict=False):
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids, repr(text)
        assert tokenizer.decode(ids) == text


def test_gpt2_from_its_own_files_agrees_with_the_gguf(data: Path, tmp_path: Path) -> None:
    folder = data / "tokenizers"
    vocabulary = json.loads((folder / "gpt2_vocab.json").read_text())
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": (folder / "gpt2_merges.txt").read_text(encoding="utf-8").rstrip("\n").split("\n"),
    }
    own = built(metadata, tmp_path / "own")
    with GgufFile(folder / "vectors" / "ggml-vocab-gpt-2.gguf") as file:
        other = built(dict(file.metadata), tmp_path / "gguf")
    text = (data / "calibration" / "technical.txt").read_text(encoding="utf-8")
    assert own.encode(text, parse_special=False) == other.encode(text, parse_special=False)


@pytest.mark.parametrize("kind", GOLDEN["ids"])
def test_every_pretokenizer_gives_the_ids_of_llamacpp(kind: str, data: Path, tmp_path: Path) -> None:
    with GgufFile(data / "tokenizers" / "vectors" / "ggml-vocab-gpt-2.gguf") as file:
        tokenizer = built(dict(file.metadata), tmp_path, **{"tokenizer.ggml.pre": kind})
    for text, ids in zip(GOLDEN["texts"], GOLDEN["ids"][kind], strict=True):
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids, repr(text)


def test_all_names_of_pretokenizers_load(tmp_path: Path) -> None:
    text = "It's 2024: naïve  café\n\n  x=1; 日本語 😀"
    bytes_only = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": sorted(byte_alphabet()),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.add_bos_token": False,
    }
    for name in names():
        tokenizer = built(bytes_only, tmp_path / name, **{"tokenizer.ggml.pre": name})
        assert tokenizer.decode(tokenizer.encode(text)) == text, name


@pytest.mark.parametrize(
    "file",
    ["text/wikitext-2.test.raw", "calibration/code.txt", "calibration/multilingual.txt", "calibration/technical.txt"],
)
def test_smollm2_from_gguf_equals_its_tokenizer_json(file: str, data: Path, smollm2: Tokenizer) -> None:
    from tokenizers import Tokenizer as Reference
    from tokenizers import pre_tokenizers

    reference = Reference.from_file(str(data / "tokenizers" / "smollm2_tokenizer.notrunc.json"))
    # The file lost one step of SmolLM2's own, the splitting of numbers into digits.
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    text = (data / file).read_text(encoding="utf-8")
    ids = smollm2.encode(text)
    assert ids == reference.encode(text, add_special_tokens=False).ids
    assert smollm2.decode(ids) == text == reference.decode(ids)


def test_sentencepiece_file_equals_the_library(data: Path, mistral: Tokenizer) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizers" / "mistral.tokenizer.model.v1"))
    for file in ("calibration/multilingual.txt", "calibration/code.txt"):
        for line in (data / file).read_text(encoding="utf-8").split("\n"):
            ids = mistral.encode(line, add_bos=False, parse_special=False)
            assert ids == (reference.encode(line) if line else []), repr(line)
            assert mistral.decode(ids) == line.replace("\u2581", " ")


def test_story_model_tokenizer_is_the_same_from_gguf_and_from_its_file(
    stories_dir: Path, stories_gguf: Path, tmp_path: Path
) -> None:
    import sentencepiece

    with GgufFile(stories_gguf) as file:
        tokenizer = built(dict(file.metadata), tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(stories_dir / "tok512.model"))
    # Not runs of spaces and line ends: the file asks for them to be squeezed, which no GGUF file does.
    for text in ("Once upon a time, Lily", "Zürich 漢字 😀 said", "a"):
        assert tokenizer.encode(text) == [1, *reference.encode(text)]


def test_special_tokens_are_read_or_spelled_out(smollm2: Tokenizer) -> None:
    assert smollm2.encode(f"a{CHATML_END}") == [*smollm2.encode("a"), 2]
    spelled = smollm2.encode(f"a{CHATML_END}", parse_special=False)
    assert 2 not in spelled and smollm2.decode(spelled) == f"a{CHATML_END}"
    assert smollm2.decode([1, *smollm2.encode("x"), 2]) == "x"
    assert smollm2.decode([1, *smollm2.encode("x"), 2], skip_special=False) == f"<|im_start|>x{CHATML_END}"
    assert smollm2.find("<|im_start|>") == 1 and smollm2.find("<|nothing|>") is None
    assert smollm2.is_special(2) and not smollm2.is_special(1000)


def test_special_tokens_of_sentencepiece_stand_alone(llama: Tokenizer) -> None:
    # As llama.cpp: a fragment after a control token begins with a space of its own.
    hello = llama.encode("Hello", add_bos=False)
    assert llama.encode("<s>Hello</s>Hello", add_bos=False) == [1, *hello, 2, *hello]
    assert 2 not in llama.encode("</s>", parse_special=False)
    assert llama.find("</s>") == 2 and llama.find("no such piece at all") is None


def test_beginning_of_text_comes_once(llama: Tokenizer, smollm2: Tokenizer) -> None:
    assert llama.add_bos and llama.encode("x")[0] == 1
    assert llama.encode("<s>x") == llama.encode("x")
    assert not smollm2.add_bos and smollm2.encode("x")[0] != 1


def test_end_tokens_include_every_way_to_end_a_turn(smollm2: Tokenizer, llama: Tokenizer) -> None:
    assert smollm2.eos_ids == (2, 0)  # <|im_end|>, <|endoftext|>
    assert llama.eos_ids == (2,)


def test_an_end_of_turn_that_is_an_ordinary_word_is_no_end(smollm2_metadata: Metadata, tmp_path: Path) -> None:
    types = list(smollm2_metadata["tokenizer.ggml.token_type"])
    types[0] = 1
    tokenizer = built(smollm2_metadata, tmp_path, **{"tokenizer.ggml.token_type": types})
    assert tokenizer.eos_ids == (2,)


@given(st.text())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_byte_level_round_trip(smollm2: Tokenizer, text: str) -> None:
    # SmolLM2's vocabulary lacks some bytes that rare characters need; no implementation can keep those.
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    kept = "".join(c for c in text if all(smollm2.find(alphabet[byte]) is not None for byte in c.encode()))
    assert smollm2.decode(smollm2.encode(kept, parse_special=False), skip_special=False) == kept


@given(st.text())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sentencepiece_round_trip(llama: Tokenizer, text: str) -> None:
    # The library takes U+2581 for a space; nothing else may change.
    clean = text.replace("\u2581", "_")
    assert llama.decode(llama.encode(clean, add_bos=False, parse_special=False)) == clean


@given(st.lists(st.integers(0, 49_151), max_size=40))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streamed_pieces_join_to_the_decoded_text(smollm2: Tokenizer, ids: list[int]) -> None:
    stream = smollm2.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == smollm2.decode(ids)


@pytest.mark.parametrize("text", ["naïve 漢字 😶‍🌫️ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 কখগ", "🦙" * 7])
def test_no_piece_holds_half_a_character(text: str, smollm2: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (smollm2, llama):
        ids = tokenizer.encode(text, add_bos=False)
        stream = tokenizer.stream(strip_space=tokenizer.add_space_prefix)
        pieces = [stream.push(token) for token in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == text and stream.finish() == ""
        assert tokenizer.stream().push(ids[0]) in ("", pieces[0], " " + pieces[0])


def test_a_text_that_ends_within_a_character_shows_the_replacement(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("🦙")
    assert len(ids) > 1
    stream = smollm2.stream()
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd" == smollm2.decode(ids[:1])


def test_lone_surrogates_and_foreign_ids_do_no_harm(smollm2: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (smollm2, llama):
        assert "\ufffd" in tokenizer.decode(tokenizer.encode("a\udc80b", add_bos=False))
        assert tokenizer.decode([-1, 10**9]) == ""
    assert smollm2.decode(smollm2.encode("\ud83d\ude00")) == "\U0001f600"


def test_a_tokenizer_is_used_by_several_threads_at_once(smollm2: Tokenizer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    text = f"one{CHATML_END}two"
    parsed, spelled = smollm2.encode(text), smollm2.encode(text, parse_special=False)
    with ThreadPoolExecutor(4) as pool:
        for i, ids in enumerate(pool.map(lambda i: smollm2.encode(text, parse_special=i % 2 == 0), range(200))):
            assert ids == (parsed if i % 2 == 0 else spelled)


def test_unknown_kinds_are_refused_by_name(smollm2_metadata: Metadata, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="made-up-pre"):
        built(smollm2_metadata, tmp_path, **{"tokenizer.ggml.pre": "made-up-pre"})
    with pytest.raises(UnsupportedModelError, match="rwkv"):
        built(smollm2_metadata, tmp_path, **{"tokenizer.ggml.model": "rwkv"})


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.model": None},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.tokens": []},
        {"tokenizer.ggml.tokens": [1, 2]},
        {"tokenizer.ggml.merges": None},
        {"tokenizer.ggml.token_type": [1, 1]},
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": ["x"]},
    ],
)
def test_a_damaged_description_is_one_model_error(
    changes: Metadata, smollm2_metadata: Metadata, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        built(smollm2_metadata, tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_odd_vocabularies_are_repaired(smollm2_metadata: Metadata, tmp_path: Path) -> None:
    """Empty and repeated tokens (padding) and merges into nothing are in files that people use."""
    tokens = [*smollm2_metadata["tokenizer.ggml.tokens"], "", "", "\u0120the"]
    merges = [*smollm2_metadata["tokenizer.ggml.merges"], "zzzz qqqq", "nospace"]
    types = [*smollm2_metadata["tokenizer.ggml.token_type"], 5, 5, 5]
    tokenizer = built(
        smollm2_metadata,
        tmp_path,
        **{
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 10**9,
        },
    )
    assert tokenizer.n_vocab == len(tokens)
    assert tokenizer.encode(" the") == [smollm2_metadata["tokenizer.ggml.tokens"].index("\u0120the")]
    assert tokenizer.bos_id == 11  # as llama.cpp: the default where the file's id is out of range


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "1.0"}'])
def test_damaged_files_of_a_packed_model_are_named(content: bytes, smollm2_metadata: Metadata, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if file == "tokenizer_config.json" and content.startswith(b'{"v'):
            continue
        built(smollm2_metadata, tmp_path)
        (tmp_path / file).write_bytes(content)
        with pytest.raises(ModelError, match=file):
            Tokenizer.load(tmp_path)
    with pytest.raises(ModelError, match="no tokenizer"):
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer_config.json").write_text("{}")
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_ids"])
@pytest.mark.parametrize("value", [1.5, "</s>", ["</s>"], {}, True, [True], [None]])
def test_token_ids_of_a_packed_model_that_are_none_are_named(
    name: str, value: Any, smollm2_metadata: Metadata, tmp_path: Path
) -> None:
    built(smollm2_metadata, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ModelError, match=rf"tokenizer_config.json: damaged \({name}"):
        Tokenizer.load(tmp_path)


def test_a_damaged_sentencepiece_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_reading_any_bytes_as_sentencepiece_ends_in_pieces_or_a_model_error(data: bytes) -> None:
    try:
        facts = read_model(data, "bytes")
    except ModelError:
        return
    assert facts.pieces


def test_hugging_face_folder_gives_the_same_tokenizer(
    smollm2: Tokenizer, smollm2_json: dict[str, Any], tmp_path: Path
) -> None:
    source, out = tmp_path / "hf", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    whole = dict(smollm2_json)
    whole["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    whole["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (source / "tokenizer.json").write_text(json.dumps(whole))
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "from config"}
        )
    )
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (source / "chat_template.jinja").write_text("from file")
    export_hf(source, out)
    tokenizer = Tokenizer.load(out)
    text = "The year 1999, in a long text that truncation would cut."
    assert tokenizer.encode(text) == smollm2.encode(text)
    assert tokenizer.bos_id == 1 and not tokenizer.add_bos
    assert set(tokenizer.eos_ids) == {0, 2, 7} and tokenizer.eos_ids[0] == 2
    assert tokenizer.chat_template == "from file"


def test_hugging_face_post_processor_decides_about_the_first_token(
    smollm2_json: dict[str, Any], tmp_path: Path
) -> None:
    whole = dict(smollm2_json)
    whole["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    out = tmp_path / "out"
    out.mkdir()
    export_hf(tmp_path, out)
    tokenizer = Tokenizer.load(out)
    assert tokenizer.add_bos and tokenizer.bos_id == 1 and tokenizer.encode("x")[0] == 1


def test_hugging_face_json_with_sentencepiece_habits(stories_dir: Path, tmp_path: Path) -> None:
    """Llama's tokenizer.json: merges over characters, U+2581 for spaces, tokens for bytes, a space before the text."""
    import sentencepiece
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Builder

    file = stories_dir / "tok512.model"
    pieces = [piece.text for piece in read_model(file.read_bytes(), "tok512").pieces]
    vocabulary = {text: i for i, text in enumerate(pieces)}
    merges = [
        (text[:cut], text[cut:])
        for text in pieces[259:]
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    builder = Builder(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    builder.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    builder.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    builder.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in pieces[:3]])
    builder.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    out = tmp_path / "out"
    out.mkdir()
    export_hf(tmp_path, out)
    tokenizer = Tokenizer.load(out)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert tokenizer.add_bos and tokenizer.add_space_prefix and tokenizer.eos_ids == (2,)
    for text in ("Once upon a time, Lily", "Zürich 漢字 😀 said"):
        ids = tokenizer.encode(text)
        assert ids == [1, *reference.encode(text)]
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream(strip_space=True)
        assert "".join(map(stream.push, ids)) == text


def test_hugging_face_sentencepiece_keeps_ids_and_flags(data: Path, mistral: Tokenizer) -> None:
    facts = read_model((data / "tokenizers" / "mistral.tokenizer.model.v1").read_bytes(), "mistral")
    assert len(facts.pieces) == 32000 == mistral.n_vocab and facts.pieces[1].kind == CONTROL
    assert mistral.bos_id == 1 and mistral.eos_ids == (2,) and mistral.add_bos and mistral.add_space_prefix


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        export_hf(tmp_path, tmp_path)


def test_gemma_vectors_with_gemmas_vocabulary(shared_dir: Path, gemma3_gguf: Path, tmp_path: Path) -> None:
    """Gemma 3 and 4 share their vocabulary; the vectors are of 4. 262,144 pieces, runs of spaces as pieces of their own."""
    with GgufFile(gemma3_gguf) as file:
        tokenizer = built(dict(file.metadata), tmp_path)
    folder = shared_dir / "data" / "tokenizers" / "vectors"
    texts = (folder / "ggml-vocab-gemma-4.gguf.inp").read_text(encoding="utf-8").split(SEPARATOR)
    wanted = (folder / "ggml-vocab-gemma-4.gguf.out").read_text().split("\n")
    for text, line in zip(texts, wanted, strict=False):
        ids = tokenizer.encode(text, add_bos=False, parse_special=False)
        assert ids == [int(i) for i in line.split()], repr(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<start_of_turn>user\n")[:2] == [2, 105]
    assert set(tokenizer.eos_ids) == {1, 106}
