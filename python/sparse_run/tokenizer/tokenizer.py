"""The tokenizer of a packed model: `tokenizer.json` through `tokenizers`, or `tokenizer.model` through `sentencepiece`.

Both libraries only cut text into ids here. Ids to text is done from the bytes of each token, so that streaming, decoding
and counting all agree."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from ..errors import ModelError
from .sentencepiece_model import NO_DUMMY_PREFIX, SPACE
from .stream import TokenStream

CONFIG_FILE, JSON_FILE, SENTENCEPIECE_FILE = "tokenizer_config.json", "tokenizer.json", "tokenizer.model"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Backend(Protocol):
    """What a tokenizer is made of."""

    n_vocab: int

    def encode(self, text: str, parse_special: bool) -> list[int]: ...

    def piece(self, token: int) -> tuple[bytes, bool]:
        """Bytes of a token, and whether it is a control token."""

    def find(self, text: str) -> int | None:
        """The id of the token with exactly this text."""


class Tokenizer:
    """Text to ids and back, with the model's own vocabulary. Safe to use from several threads.

    >>> tokenizer = Tokenizer.load(directory)  # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Hello world"))  # doctest: +SKIP
    'Hello world'
    """

    def __init__(self, backend: Backend, config: dict[str, Any]) -> None:
        """Use `Tokenizer.load`."""
        self._backend = backend
        self._config = config
        self._pieces: dict[int, tuple[bytes, bool]] = {}

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Loads the tokenizer of a packed model. Raises ModelError where it is missing or damaged."""
        folder = Path(directory)
        config = read_config(folder / CONFIG_FILE)
        if (folder / JSON_FILE).is_file():
            return cls(JsonBackend(folder / JSON_FILE), config)
        if (folder / SENTENCEPIECE_FILE).is_file():
            return cls(_SentencePieceBackend(folder / SENTENCEPIECE_FILE, config), config)
        raise ModelError(
            f"{folder}: no tokenizer ({JSON_FILE} or {SENTENCEPIECE_FILE}); convert the model again from a source that has one"
        )

    @property
    def n_vocab(self) -> int:
        """How many ids the tokenizer knows; a model may have more (padding), which it never produces."""
        return self._backend.n_vocab

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text."""
        value = self._config.get("bos_token_id")
        return value if isinstance(value, int) else None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All tokens that end an answer: end of text, end of turn, end of message."""
        return tuple(self._config.get("eos_token_ids") or ())

    @property
    def add_bos(self) -> bool:
        """Whether the model expects a text to begin with `bos_id`."""
        return bool(self._config.get("add_bos")) and self.bos_id is not None

    @property
    def add_space_prefix(self) -> bool:
        """Whether a text is tokenized as if a space stood before it (SentencePiece)."""
        return bool(self._config.get("add_space_prefix"))

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's chat template (Jinja), where it has one."""
        value = self._config.get("chat_template")
        return value if isinstance(value, str) else None

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text. `add_bos` puts the beginning-of-text token in front where the model expects one and the text
        does not bring it; `parse_special` reads `<|im_end|>` and its like as the tokens they name, not as characters."""
        ids = self._backend.encode(_without_surrogates(text), parse_special) if text else []
        if add_bos and self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids. Control tokens are left out unless `skip_special` is false; bytes that are no UTF-8 become
        U+FFFD; the space that SentencePiece puts before a text is dropped."""
        data = b"".join(self.token_bytes(token, skip_special=skip_special) for token in ids)
        if self.add_space_prefix:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def stream(self, *, skip_special: bool = True, strip_space: bool = False) -> TokenStream:
        """A decoder for tokens that come one by one."""
        return TokenStream(self, skip_special=skip_special, strip_space=strip_space)

    @property
    def peak_bytes(self) -> int:
        """What cutting text into ids takes at most beside what the process holds; 0 where nothing comes and goes (`lean`)."""
        return 0

    def attach(self, set_aside: Callable[[int], None]) -> None:
        """`set_aside(bytes)` makes room from now on before those are taken, and is told 0 when they are given back."""

    def release(self) -> None:
        """Gives back memory that only cutting text into ids needs."""

    def token_bytes(self, token: int, *, skip_special: bool = True) -> bytes:
        """The bytes that one token stands for; none for control tokens (unless asked) and for ids that do not exist."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._backend.piece(token) if 0 <= token < self.n_vocab else (b"", True)
        data, control = piece
        return b"" if control and skip_special else data

    def is_special(self, token: int) -> bool:
        """Whether a token is a control token: it stands for no text."""
        self.token_bytes(token)
        return self._pieces[token][1]

    def find(self, text: str) -> int | None:
        """The id of the token whose text is exactly `text`, such as "<|im_start|>"."""
        return self._backend.find(text)

    def token_text(self, token: int | None) -> str:
        """The text of one token, control tokens included ("" for None): what templates call `bos_token`."""
        return "" if token is None else self.token_bytes(token, skip_special=False).decode("utf-8", errors="replace")


def read_config(path: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`; ModelError where it is missing or damaged."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: no {path.name}; convert the model again") from None
    except ValueError as error:
        raise ModelError(f"{path}: damaged ({error}); convert the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: damaged (not a JSON object); convert the model again")
    bos, ends = config.get("bos_token_id"), config.get("eos_token_ids")
    if not (bos is None or type(bos) is int):
        raise ModelError(f"{path}: damaged (bos_token_id is {bos!r}, no token id); convert the model again")
    if not (ends is None or (isinstance(ends, list) and all(type(end) is int for end in ends))):
        raise ModelError(f"{path}: damaged (eos_token_ids is {ends!r}, no list of token ids); convert the model again")
    return config


def _without_surrogates(text: str) -> str:
    """Lone surrogates (undecodable bytes of a command line) become U+FFFD, pairs the character they mean."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE vocabularies: printable Latin-1 as itself, the others
    from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{chr(byte): byte for byte in printable}, **{chr(0x100 + i): byte for i, byte in enumerate(others)}}


class JsonBackend:
    """`tokenizer.json`: byte-level BPE, or BPE over characters with U+2581 for a space and tokens for single bytes."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            decoder = str(self._tokenizer.decoder.__getstate__()) if self._tokenizer.decoder is not None else ""
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            raise ModelError(f"{path}: damaged tokenizer ({error}); convert the model again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._added = {
            token: (added.content, bool(added.special))
            for token, added in self._tokenizer.get_added_tokens_decoder().items()
        }
        self.n_vocab = max([self._tokenizer.get_vocab_size() - 1, *self._added], default=-1) + 1
        self._byte_level = "ByteLevel" in decoder
        self._lock = threading.Lock()

    def encode(self, text: str, parse_special: bool) -> list[int]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not parse_special
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def piece(self, token: int) -> tuple[bytes, bool]:
        if token in self._added:
            text, special = self._added[token]
            return text.encode(), special
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b"", True
        if self._byte_level:
            alphabet = byte_alphabet()
            if all(character in alphabet for character in piece):
                return bytes(alphabet[character] for character in piece), False
            return piece.encode(), False
        single = _BYTE_PIECE.match(piece)
        if single:
            return bytes([int(single[1], 16)]), False
        return piece.replace(SPACE, " ").encode(), False

    def find(self, text: str) -> int | None:
        token = self._tokenizer.token_to_id(text)
        return None if token is None else int(token)


class _SentencePieceBackend:
    """`tokenizer.model`. Control tokens and the space before a text are ours, the rest is the library's."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes() + NO_DUMMY_PREFIX)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ModelError(f"{path}: damaged tokenizer ({error}); convert the model again") from None
        self.n_vocab = int(self._processor.GetPieceSize())
        self._space_prefix = bool(config.get("add_space_prefix"))
        special = config.get("special_tokens")
        self._special: dict[str, int] = special if isinstance(special, dict) else {}
        self._special_ids = set(self._special.values())
        # Gemma has 6,000 control tokens, nearly all of which begin with "<": they are looked up where one may begin.
        self._lengths: dict[str, list[int]] = {}
        for name in filter(None, self._special):
            lengths = self._lengths.setdefault(name[0], [])
            if len(name) not in lengths:
                lengths.append(len(name))
        for lengths in self._lengths.values():
            lengths.sort(reverse=True)
        self._starts = re.compile("[" + "".join(map(re.escape, self._lengths)) + "]") if self._lengths else None

    def encode(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = []
        at = 0
        for begin, end in self._special_spans(text) if parse_special else ():
            if begin > at:
                ids += self._plain(text[at:begin])
            ids.append(self._special[text[begin:end]])
            at = end
        return ids + self._plain(text[at:]) if at < len(text) else ids

    def _special_spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where control tokens stand, from left to right, the longest where several begin."""
        at = 0
        for start in self._starts.finditer(text) if self._starts is not None else ():
            begin = start.start()
            if begin < at:
                continue
            length = next((n for n in self._lengths[text[begin]] if text[begin : begin + n] in self._special), 0)
            if length:
                at = begin + length
                yield begin, at

    def _plain(self, text: str) -> list[int]:
        # U+2581 in the text itself means a space to the library; every SentencePiece tokenizer has that flaw.
        return list(self._processor.EncodeAsIds(" " + text if self._space_prefix else text))

    def piece(self, token: int) -> tuple[bytes, bool]:
        text = str(self._processor.IdToPiece(token))
        if token in self._special_ids or self._processor.IsControl(token):
            return text.encode(), True
        if self._processor.IsByte(token):
            return bytes([int(text[3:5], 16)]), False
        if self._processor.IsUnknown(token):
            return "\ufffd".encode(), False
        return text.replace(SPACE, " ").encode(), False

    def find(self, text: str) -> int | None:
        token = int(self._processor.PieceToId(text))
        return token if self._processor.IdToPiece(token) == text else None
