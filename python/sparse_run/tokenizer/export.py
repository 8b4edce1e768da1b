"""Writes the tokenizer of a packed model: from the metadata of a GGUF file, or from the files of a Hugging Face folder.

Output: `tokenizer.json` or `tokenizer.model`, and `tokenizer_config.json` (models/format.md)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError, UnsupportedModelError
from .pretokenizers import pretokenizer
from .sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    read_model,
    write_model,
    write_pieces,
)
from .tokenizer import CONFIG_FILE, JSON_FILE, SENTENCEPIECE_FILE

# Tokens that end a turn in some family. A model may stop at any of them that its vocabulary has as a token of its own.
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<|return|>",
    "<|call|>",
    "<|assistant_end|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|user_end|>",
    "<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "[|endofturn|]",
)


_MOST_ADDED = 1 << 16  # tokens beside a SentencePiece model; more can only be damage


def export_gguf(metadata: Mapping[str, Any], out_dir: str | Path) -> None:
    """Rebuilds the tokenizer that a GGUF file describes (keys `tokenizer.*`) and writes it into `out_dir`.

    Raises ModelError where the description is missing or contradicts itself, UnsupportedModelError for a kind of tokenizer
    or pre-tokenizer that is not known."""
    out = Path(out_dir)
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model in ("none", "no_vocab"):
        raise ModelError("the file has no tokenizer (tokenizer.ggml.model); use a GGUF file that was made with one")
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError("the file's tokenizer has no vocabulary (tokenizer.ggml.tokens); fetch the file again")
    kinds = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens))
    types = [int(kind) for kind in kinds] if kinds else [NORMAL] * len(tokens)
    config: dict[str, Any] = {"tokenizer": model}
    if model == "gpt2":
        name = metadata.get("tokenizer.ggml.pre", "default")
        config["pre_tokenizer"] = name
        rule = pretokenizer(str(name))
        _write_byte_bpe(metadata, tokens, types, rule.patterns, rule.ignore_merges, out)
        defaults = {"bos": 11, "eos": 11, "unknown": None}
        add_bos, space_prefix = rule.add_bos, False
    elif model == "llama":
        space_prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", True)
        defaults = {"bos": 1, "eos": 2, "unknown": 0}
        add_bos = True
        _write_sentencepiece(metadata, tokens, types, defaults, out)
        config["special_tokens"] = {text: i for i, text in enumerate(tokens) if types[i] == CONTROL}
    else:
        raise UnsupportedModelError(
            f"tokenizers of kind {model!r} (tokenizer.ggml.model) are not supported; use a model with a BPE (gpt2) or "
            f"SentencePiece (llama) tokenizer"
        )
    config["bos_token_id"] = _token_id(metadata, "bos", defaults["bos"], len(tokens))
    ends = [_token_id(metadata, key, defaults.get(key), len(tokens)) for key in ("eos", "eot", "eom")]
    own = {text: i for i, text in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)}
    config["eos_token_ids"] = _end_ids(ends, own)
    config["add_bos"] = _flag(metadata, "tokenizer.ggml.add_bos_token", add_bos) and config["bos_token_id"] is not None
    config["add_eos"] = _flag(metadata, "tokenizer.ggml.add_eos_token", False)
    config["add_space_prefix"] = space_prefix
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and template.strip():
        config["chat_template"] = template
    _write_json(out / CONFIG_FILE, config)


def _end_ids(named: Iterable[int | None], own_tokens: Mapping[str, int]) -> list[int]:
    """All ids that end an answer, the named ones first, without repetition."""
    ids = [token for token in named if token is not None]
    ids += [own_tokens[text] for text in END_OF_TURN if text in own_tokens]
    return list(dict.fromkeys(ids))


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise ModelError(f"the file's tokenizer has no list of texts {key}; use a GGUF file that was made with one")
    return list(value)


def _numbers(metadata: Mapping[str, Any], key: str, count: int) -> Sequence[float]:
    value = metadata.get(key)
    if value is None:
        return []
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or len(value) < count or not all(isinstance(x, (int, float)) for x in value):
        raise ModelError(f"the file's tokenizer is damaged ({key} does not match the vocabulary); fetch the file again")
    return value[:count]


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key)
    return default if value is None else bool(value)


def _token_id(metadata: Mapping[str, Any], key: str, default: int | None, n_vocab: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if isinstance(value, int) and 0 <= value < n_vocab:
        return value
    return default if default is not None and default < n_vocab else None


def _unique(tokens: list[str]) -> list[str]:
    """Vocabularies must not hold a text twice, or an empty one; such entries (padding, mostly) get names of their own."""
    seen: set[str] = set()
    result = []
    for i, text in enumerate(tokens):
        name = text if text and text not in seen else f"[UNREACHABLE_{i}]"
        seen.add(name)
        result.append(name)
    return result


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for line in _texts(metadata, "tokenizer.ggml.merges"):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        # A merge into a token that does not exist can never happen, and the library refuses the whole file for it.
        if cut > 0 and left in vocabulary and right in vocabulary and left + right in vocabulary:
            merges.append((left, right))
    return merges


def _write_byte_bpe(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    patterns: Sequence[str],
    ignore_merges: bool,
    out: Path,
) -> None:
    import tokenizers
    from tokenizers import decoders, pre_tokenizers

    vocabulary = {text: i for i, text in enumerate(_unique(tokens))}
    try:
        built = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocab=vocabulary, merges=_merges(metadata, vocabulary), ignore_merges=ignore_merges)
        )
        splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        built.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        built.decoder = decoders.ByteLevel()
        own = [
            tokenizers.AddedToken(text, special=types[i] in (CONTROL, UNKNOWN), normalized=False)
            for i, text in enumerate(tokens)
            if types[i] in (CONTROL, UNKNOWN, USER_DEFINED) and text
        ]
        built.add_tokens(own)
        text = built.to_str(pretty=False)
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise ModelError(f"the file's tokenizer cannot be rebuilt ({error}); fetch the file again") from None
    (out / JSON_FILE).write_text(text, encoding="utf-8")


def _write_sentencepiece(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    defaults: Mapping[str, int | None],
    out: Path,
) -> None:
    import sentencepiece

    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens)) or [0.0] * len(tokens)
    n_vocab = len(tokens)
    ids = {key: _token_id(metadata, key, defaults.get(key), n_vocab) for key in ("unknown", "bos", "eos", "padding")}
    unk = ids["unknown"] if UNKNOWN not in types else types.index(UNKNOWN)
    if unk is None:
        raise ModelError(
            "the file's tokenizer names no unknown token (tokenizer.ggml.unknown_token_id); fetch it again"
        )
    pieces = []
    # The user-defined pieces of GGUF files hold plain spaces where the library, after escaping, looks for U+2581.
    for i, text in enumerate(_unique([text.replace(" ", SPACE) for text in tokens])):
        kind = types[i] if NORMAL <= types[i] <= BYTE else NORMAL
        if i == unk:
            kind = UNKNOWN
        elif kind == UNKNOWN or text != tokens[i].replace(" ", SPACE):
            kind = UNUSED
        pieces.append(Piece(text, float(scores[i]), kind))
    bos, eos, pad = (-1 if value is None else value for value in (ids["bos"], ids["eos"], ids["padding"]))
    data = write_model(pieces, unk=unk, bos=bos, eos=eos, pad=pad)
    try:
        sentencepiece.SentencePieceProcessor().LoadFromSerializedProto(data)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"the file's tokenizer cannot be rebuilt ({error}); fetch the file again") from None
    (out / SENTENCEPIECE_FILE).write_bytes(data)


def export_hf(src_dir: str | Path, out_dir: str | Path, n_vocab: int | None = None) -> None:
    """Takes the tokenizer of a Hugging Face folder over into `out_dir`: `tokenizer.json`, else `tokenizer.model`; ids, flags
    and template from tokenizer_config.json, added_tokens.json, generation_config.json, config.json and chat_template.jinja.

    `n_vocab` is the height of the model's embedding: tokens that were added beyond it (Gemma's for images) are left out.
    Raises ModelError where there is no tokenizer, one that is damaged or too large for the model, UnsupportedModelError for
    other kinds."""
    src, out = Path(src_dir), Path(out_dir)
    described = _read_json(src / "tokenizer_config.json")
    config: dict[str, Any] = {"tokenizer": described.get("tokenizer_class")}
    if (src / JSON_FILE).is_file():
        own = _take_json(src / JSON_FILE, out, described, config, n_vocab)
    elif (src / SENTENCEPIECE_FILE).is_file():
        own = _take_sentencepiece(src / SENTENCEPIECE_FILE, out, described, config, n_vocab)
    else:
        raise ModelError(f"{src}: no tokenizer; the folder needs {JSON_FILE} or {SENTENCEPIECE_FILE}")
    ends: list[int | None] = [own.get(_content(described.get("eos_token")))]
    ends += config.get("eos_token_ids", [])
    for described_ends in (_read_json(src / "generation_config.json"), _read_json(src / "config.json")):
        for holder in (described_ends, described_ends.get("text_config")):
            value = holder.get("eos_token_id") if isinstance(holder, dict) else None
            ends += [token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)]
    config["eos_token_ids"] = [t for t in _end_ids(ends, own) if n_vocab is None or 0 <= t < n_vocab]
    template = _hf_template(src, described)
    if template:
        config["chat_template"] = template
    _write_json(out / CONFIG_FILE, config)


def _need_room(path: Path, tokens: int, n_vocab: int | None) -> None:
    if n_vocab is not None and tokens > n_vocab:
        raise ModelError(
            f"{path}: the tokenizer has {tokens} tokens, but the model's embedding {n_vocab}; they do not belong together, "
            "fetch the folder again"
        )


def _take_json(
    path: Path, out: Path, described: Mapping[str, Any], config: dict[str, Any], n_vocab: int | None
) -> dict[str, int]:
    import tokenizers

    try:
        built = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises plain Exception
        raise ModelError(f"{path}: damaged tokenizer ({error}); fetch the file again") from None
    if isinstance(built.model, (tokenizers.models.WordPiece, tokenizers.models.WordLevel)):
        raise UnsupportedModelError(f"{path}: tokenizers of kind {type(built.model).__name__} are not supported")
    added = built.get_added_tokens_decoder()
    _need_room(path, built.get_vocab_size(with_added_tokens=False), n_vocab)
    if n_vocab is not None and any(token >= n_vocab for token in added):
        content = json.loads(path.read_bytes())
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] < n_vocab]
        (out / JSON_FILE).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        added = {token: entry for token, entry in added.items() if token < n_vocab}
    else:
        _copy(path, out / JSON_FILE)
    built.no_truncation()
    built.no_padding()
    own = {entry.content: token for token, entry in added.items()}
    bos = own.get(_content(described.get("bos_token")))
    # The post-processor says what is put around a text; Llama's classes make one from the configuration.
    bare, dressed = built.encode("a", add_special_tokens=False).ids, built.encode("a", add_special_tokens=True).ids
    leads = len(dressed) > len(bare) and dressed[0] != bare[0]
    if bos is None and leads:
        bos = dressed[0]
    config["bos_token_id"] = bos
    config["add_bos"] = bos is not None and (leads or described.get("add_bos_token") is True)
    config["add_eos"] = len(dressed) > len(bare) + int(leads)
    decoder = json.loads(built.decoder.__getstate__()) if built.decoder is not None else {}
    steps = decoder.get("decoders", [decoder])
    config["add_space_prefix"] = any(
        (step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return own


def _take_sentencepiece(
    path: Path, out: Path, described: Mapping[str, Any], config: dict[str, Any], n_vocab: int | None
) -> dict[str, int]:
    facts = read_model(path.read_bytes(), str(path))
    if facts.remove_extra_whitespaces:
        raise UnsupportedModelError(f"{path}: a SentencePiece model that squeezes spaces is not supported")
    _need_room(path, len(facts.pieces), n_vocab)
    own = {piece.text: i for i, piece in enumerate(facts.pieces) if piece.kind in (CONTROL, USER_DEFINED)}
    special = {piece.text: i for i, piece in enumerate(facts.pieces) if piece.kind == CONTROL}
    beyond: dict[int, Piece] = {}
    for token, (text, is_special) in _added_tokens(path.parent, described).items():
        if n_vocab is not None and token >= n_vocab:
            continue
        own[text] = token
        if is_special:
            special[text] = token
        if token >= len(facts.pieces):
            beyond[token] = Piece(text.replace(" ", SPACE), 0.0, CONTROL if is_special else USER_DEFINED)
    last = min(max(beyond, default=0), len(facts.pieces) + _MOST_ADDED)
    more = [beyond.get(i, Piece(f"[UNUSED_{i}]", 0.0, UNUSED)) for i in range(len(facts.pieces), last + 1)]
    if more:
        (out / SENTENCEPIECE_FILE).write_bytes(path.read_bytes() + write_pieces(more))
    else:
        _copy(path, out / SENTENCEPIECE_FILE)
    bos = own.get(_content(described.get("bos_token")), facts.bos if facts.bos >= 0 else None)
    config["bos_token_id"] = bos
    config["add_bos"] = bool(described.get("add_bos_token", True)) and bos is not None
    config["add_eos"] = bool(described.get("add_eos_token", False))
    config["add_space_prefix"] = facts.add_dummy_prefix
    config["special_tokens"] = {text: token for text, token in special.items() if token != facts.unk}
    if "eos_token" not in described and facts.eos >= 0:
        own.setdefault(facts.pieces[facts.eos].text, facts.eos)
        config["eos_token_ids"] = [facts.eos]
    return own


def _added_tokens(folder: Path, described: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens that stand beside a SentencePiece model: id to text, and whether they are control tokens."""
    tokens: dict[int, tuple[str, bool]] = {}
    for text, token in _read_json(folder / "added_tokens.json").items():
        if isinstance(token, int) and token >= 0 and text:
            tokens[token] = (text, False)
    added = described.get("added_tokens_decoder")
    for key, entry in (added if isinstance(added, dict) else {}).items():
        text = _content(entry)
        if text and key.isdigit():
            tokens[int(key)] = (text, bool(entry.get("special")))
    return tokens


def _content(entry: Any) -> str:
    """The text of a token entry of tokenizer_config.json: a text, or an object with `content`."""
    value = entry.get("content") if isinstance(entry, dict) else entry
    return value if isinstance(value, str) else ""


def _hf_template(src: Path, described: Mapping[str, Any]) -> str | None:
    file = src / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = described.get("chat_template") or _read_json(src / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # named templates
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); fetch the file again") from None
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    if os.path.realpath(source) != os.path.realpath(target):
        shutil.copyfile(source, target)
