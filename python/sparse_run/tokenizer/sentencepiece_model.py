"""SentencePiece's model file, written and skimmed by hand: a protocol buffer with a list of pieces and two small records.

Fields (sentencepiece_model.proto): ModelProto {1: piece..., 2: trainer_spec, 3: normalizer_spec}; piece {1: text, 2: score,
3: type}; trainer_spec {3: model_type, 4: vocab_size, 35: byte_fallback, 40-43: unk, bos, eos, pad ids};
normalizer_spec {1: name, 2: character map, 3: add_dummy_prefix, 4: remove_extra_whitespaces, 5: escape_whitespaces}."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"

_MODEL_TYPE_BPE = 2
# A record that appears twice is merged field by field, the later value winning: these bytes, put behind a model, switch its
# dummy prefix off. We write that space ourselves, because only we know which fragments follow a control token.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class Piece:
    """One token: its text with U+2581 for a space, its score, its type (NORMAL ... BYTE)."""

    text: str
    score: float
    kind: int


def _varint(value: int) -> bytes:
    if value < 0:
        value += 1 << 64
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(value)


def write_model(pieces: Sequence[Piece], *, unk: int, bos: int, eos: int, pad: int) -> bytes:
    """A BPE model with these pieces, identity normalisation, no dummy prefix and no squeezing of spaces. Ids of -1: none."""
    out = write_pieces(pieces)
    trainer = _field(3, _MODEL_TYPE_BPE) + _field(4, len(pieces))
    if any(piece.kind == BYTE for piece in pieces):
        trainer += _field(35, 1)
    for number, token in ((40, unk), (41, bos), (42, eos), (43, pad)):
        trainer += _field(number, token)
    # The names of the meta pieces must be those of the list, or the library adds its own.
    for number, token in ((45, unk), (46, bos), (47, eos), (48, pad)):
        if 0 <= token < len(pieces):
            trainer += _field(number, pieces[token].text.encode())
    normalizer = _field(1, b"identity") + _field(3, 0) + _field(4, 0) + _field(5, 1)
    return out + _field(2, trainer) + _field(3, normalizer)


def write_pieces(pieces: Sequence[Piece]) -> bytes:
    """The pieces alone: put behind a model, they are its next ones."""
    out = bytearray()
    for piece in pieces:
        body = _field(1, piece.text.encode()) + b"\x15" + struct.pack("<f", piece.score)
        if piece.kind != NORMAL:
            body += _field(3, piece.kind)
        out += b"\x0a" + _varint(len(body)) + body
    return bytes(out)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at, end = 0, len(data)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < end:
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            if wire != 2:
                raise ValueError(f"wire type {wire}")
            size = varint()
        if at + size > end:
            raise ValueError("record beyond the end")
        yield number, data[at : at + size]
        at += size


@dataclass(frozen=True)
class ModelFacts:
    """What a SentencePiece file says beside its pieces."""

    pieces: list[Piece]
    unk: int
    bos: int
    eos: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(data: bytes, name: str) -> ModelFacts:
    """Reads a model file; raises ModelError, naming `name`, where it is damaged."""
    pieces: list[Piece] = []
    ids = {40: 0, 41: 1, 42: 2}
    flags = {3: 1, 4: 1}
    try:
        for number, value in _fields(memoryview(data)):
            if not isinstance(value, memoryview):
                continue
            if number == 1:
                text, score, kind = "", 0.0, NORMAL
                for key, item in _fields(value):
                    if key == 1 and isinstance(item, memoryview):
                        text = bytes(item).decode()
                    elif key == 2 and isinstance(item, memoryview):
                        (score,) = struct.unpack("<f", item)
                    elif key == 3 and isinstance(item, int):
                        kind = item
                pieces.append(Piece(text, score, kind))
            elif number in (2, 3):
                known = ids if number == 2 else flags
                for key, item in _fields(value):
                    if key in known and isinstance(item, int):
                        known[key] = item - (1 << 64) if item >> 63 else item
    except (IndexError, ValueError, struct.error) as error:
        raise ModelError(f"{name}: not a SentencePiece model ({error}); fetch the file again") from None
    if not pieces:
        raise ModelError(f"{name}: not a SentencePiece model (it holds no pieces); fetch the file again")
    return ModelFacts(pieces, ids[40], ids[41], ids[42], bool(flags[3]), bool(flags[4]))
