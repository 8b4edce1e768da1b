"""Tokenizers of real vocabularies: llama.cpp's vectors for every family at hand, streamed text, and the cutting into words
against the regular expressions that the families publish in their tokenizer.json."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_run.convert.gguf_reader import GgufFile
from sparse_run.tokenizer import Tokenizer, export_gguf
from sparse_run.tokenizer.pretokenizers import pretokenizer
from sparse_run.tokenizer.tokenizer import byte_alphabet
from vocabularies import SHA256, fetch_vocabularies, file_name

SEPARATOR = "\n__ggml_vocab_test__\n"
ANY_FIXTURE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def vocabularies(kept_dir: Path, need: Callable[[str], NoReturn]) -> Path:
    try:
        return fetch_vocabularies(kept_dir / "vocabularies")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        need(f"the vocabularies cannot be fetched (offline?): {error}")


@pytest.fixture(scope="module")
def tokenizers_of(vocabularies: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    made: dict[str, Tokenizer] = {}

    def tokenizer(name: str) -> Tokenizer:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with GgufFile(vocabularies / file_name(name)) as file:
                export_gguf(dict(file.metadata), folder)
            made[name] = Tokenizer.load(folder)
        return made[name]

    return tokenizer


@pytest.mark.parametrize("name", sorted(SHA256))
def test_vectors_of_llamacpp_are_met(
    name: str, vocabularies: Path, shared_dir: Path, tokenizers_of: Callable[[str], Tokenizer]
) -> None:
    # Those of the shared data are the reference; a few more families come with the vocabularies.
    shared = shared_dir / "data" / "tokenizers" / "vectors"
    folder = shared if (shared / (file_name(name) + ".inp")).exists() else vocabularies
    texts = (folder / (file_name(name) + ".inp")).read_text(encoding="utf-8").split(SEPARATOR)
    lines = (folder / (file_name(name) + ".out")).read_text().split("\n")
    wanted = [[int(i) for i in line.split()] for line in lines]
    assert len(texts) == 47 and len(wanted) >= len(texts)
    tokenizer = tokenizers_of(name)
    for text, ids in zip(texts, wanted, strict=False):
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids, repr(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "phi-3", "falcon", "deepseek-llm"])
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 60))
@settings(ANY_FIXTURE, max_examples=60)
def test_any_tokens_streamed_are_their_text_and_no_character_comes_in_halves(
    name: str, seed: int, count: int, tokenizers_of: Callable[[str], Tokenizer]
) -> None:
    import random

    tokenizer = tokenizers_of(name)
    ids = random.Random(seed).choices(range(tokenizer.n_vocab), k=count)
    stream = tokenizer.stream(strip_space=tokenizer.add_space_prefix)
    pieces = [stream.push(token) for token in ids]
    last = stream.finish()
    assert "".join(pieces) + last == tokenizer.decode(ids)
    # A replacement stands for bytes that are no text whatever follows: the text before them does not change with more ids.
    shown = ""
    for i, piece in enumerate(pieces):
        shown += piece
        assert tokenizer.decode(ids[: i + 1]).startswith(shown)


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "phi-3", "falcon", "mpt", "starcoder"])
@given(text=st.text(max_size=80))
@settings(ANY_FIXTURE, max_examples=60)
def test_any_text_comes_back(name: str, text: str, tokenizers_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizers_of(name)
    clean = text.replace("\u2581", "_")  # a space to SentencePiece
    if name in ("falcon", "starcoder"):  # they lack some bytes, which no implementation can keep
        clean = "".join(c for c in clean if all(tokenizer.find(_BYTES[byte]) is not None for byte in c.encode()))
    ids = tokenizer.encode(clean, add_bos=False, parse_special=False)
    assert tokenizer.decode(ids, skip_special=False) == clean


_BYTES = {byte: character for character, byte in byte_alphabet().items()}

# As the families publish them; GPT-2's is that of the library's ByteLevel step.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED: dict[str, str | None] = {
    "gpt-2": None,
    "llama-bpe": rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}",
    "tekken": rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_TAIL}",
    "gpt-4o": rf"{_LEAD}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_LEAD}{_UPPER}+{_LOWER}*{_ENDINGS}?|\p{{N}}{{1,3}}|{_TAIL}",
    "smollm": None,
    "starcoder": None,
    "refact": None,
    "command-r": None,
}
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]), st.sampled_from(list(" \n\r\t'sStTrevmld019.,!/ABab\u00a0\u0661\u4e2d"))
)


@pytest.mark.parametrize("name", PUBLISHED)
@given(text=st.text(CHARACTERS, max_size=60))
@settings(deadline=None, max_examples=150)
def test_words_are_cut_as_the_families_publish_it(name: str, text: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    pattern = PUBLISHED[name]
    if pattern is None:
        steps = [] if name == "gpt-2" else [pre_tokenizers.Digits(individual_digits=True)]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    published = pre_tokenizers.Sequence(steps)
    ours = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in pretokenizer(name).patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)
