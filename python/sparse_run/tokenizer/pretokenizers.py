"""How each family of byte-level BPE tokenizers cuts text into words before it merges, by GGUF's `tokenizer.ggml.pre`.

A kind is a list of regular expressions applied one after the other: each cuts the pieces left by the one before into its
matches and what lies between them. Checked against llama.cpp with one vocabulary under every name (tests/golden)."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnsupportedModelError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _modern(digits: str, *, contraction: str = _CONTRACTION + "|", letters: str = r"\p{L}+") -> str:
    """The pattern that GPT-4 began: a letter run may start with one other character, digits come in short groups."""
    return rf"{contraction}[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(digits: str, suffix: str) -> str:
    """The pattern of GPT-4o: a word is upper case letters, then lower case letters."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


@dataclass(frozen=True)
class Pretokenizer:
    """patterns: applied in turn. ignore_merges: a word that is a token stays whole, whatever the merges say.
    add_bos: what the family does where the file does not say."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_HAN_KANA = r"[一-龥\x{3040}-ゟ゠-ヿ]+"
_HAN_HANGUL = r"[一-龥ࠀ-一가-\x{d7ff}]+"
_PUNCTUATED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

# The cased letters of the Unicode version that DeepSeek's list was made from, without Armenian's small ones.
_CASED = (
    r"(?:(?![\x{560}-\x{588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c88}\x{2d00}-\x{2d2d}\x{a790}-\x{ab68}\x{10570}-\x{105bc}"
    r"\x{16e40}-\x{1df1e}])[\p{Lu}\p{Ll}\p{Lt}])+"
)
_WIDE_PUNCTUATION = r"[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+"

_SEED = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"

_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)

_KINDS: dict[str, Pretokenizer] = {
    "default": Pretokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Pretokenizer((_GPT2,)),
    "digits": Pretokenizer((r"\p{N}", _GPT2)),
    "falcon": Pretokenizer((r"[\p{P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "llama3": Pretokenizer((_modern(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
    "dbrx": Pretokenizer((_modern(r"\p{N}{1,3}"),)),
    "qwen2": Pretokenizer((_modern(r"\p{N}"),)),
    "qwen35": Pretokenizer((_QWEN35,)),
    "gpt-4o": Pretokenizer((_cased(r"\p{N}{1,3}", _CONTRACTION + "?"),)),
    "tekken": Pretokenizer((_cased(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    "deepseek-coder": Pretokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")),
    "deepseek-llm": Pretokenizer(
        (r"[\r\n]", rf"\s?{_CASED}", rf"\s?{_WIDE_PUNCTUATION}", r"\s+$", _HAN_HANGUL, r"\p{N}+")
    ),
    "seed-coder": Pretokenizer((_SEED,)),
    "deepseek-v3": Pretokenizer((r"\p{N}{1,3}", _HAN_KANA, _PUNCTUATED)),
    "bloom": Pretokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",)),
    "viking": Pretokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}")),
}

_FAMILIES: dict[str, tuple[str, ...]] = {
    "default": ("default",),
    "gpt-2": (
        *("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling", "gigachat"),
        *("a.x-4.0", "mellum", "modern-bert"),
    ),
    "digits": ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "falcon": ("falcon",),
    "llama3": ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "dbrx": ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "kormo", "grok-2"),
    "qwen35": ("qwen35",),
    "gpt-4o": ("gpt-4o", "llama4", "kanana2", "minimax-m2"),
    "tekken": ("tekken",),
    "deepseek-coder": ("deepseek-coder",),
    "deepseek-llm": ("deepseek-llm",),
    "seed-coder": ("seed-coder",),
    "deepseek-v3": ("deepseek-v3", "hunyuan-dense", "joyai-llm"),
    "bloom": ("bloom", "poro-chat", "gpt3-finnish"),
    "viking": ("viking",),
}
_NAMES = {name: kind for kind, names in _FAMILIES.items() for name in names}


def names() -> list[str]:
    """The values of `tokenizer.ggml.pre` that are known."""
    return sorted(_NAMES)


def pretokenizer(name: str) -> Pretokenizer:
    """The pre-tokenizer that a GGUF file names; raises UnsupportedModelError for a name that is not known."""
    if name not in _NAMES:
        raise UnsupportedModelError(
            f"the tokenizer's pre-tokenizer {name!r} (tokenizer.ggml.pre) is not supported; "
            f"convert the original checkpoint, which carries tokenizer.json, or use a model of another family"
        )
    return _KINDS[_NAMES[name]]
