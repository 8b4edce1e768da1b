"""The GGUF reader: sound files in full, and every kind of damage as one clear error."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_run.convert.gguf_reader import GgufFile
from sparse_run.errors import ModelError, UnsupportedModelError

U32, STRING, ARRAY, F32, BOOL, I64 = 4, 8, 9, 6, 7, 11


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head.ljust(-(-len(head) // alignment) * alignment, b"\0") + data


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def function(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return function


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    words = [f"wörd{i}" for i in range(100_000)]
    writer.add_token_list(words)
    writer.add_token_scores([i / 7 for i in range(1000)])
    writer.add_array("flags", [True, False, True])
    writer.add_array("numbers", [-5, 7])
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -30000)
    writer.add_uint64("u64", 1 << 60)
    writer.add_int64("i64", -(1 << 60))
    writer.add_float32("f32", 0.25)
    writer.add_float64("f64", 1 / 3)
    writer.add_bool("yes", True)
    writer.add_string("text", "ä")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 64)).astype(np.float32), rng.normal(size=5).astype(np.float16)
    q = gguf.quants.quantize(a, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("a", a)
    writer.add_tensor("b", b)
    writer.add_tensor("q", q, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(path) as file:
        m = file.metadata
        assert m["tokenizer.ggml.tokens"] == words
        assert m.array_length("tokenizer.ggml.tokens") == len(words)
        assert m["tokenizer.ggml.scores"] == pytest.approx([i / 7 for i in range(1000)])
        assert m["flags"] == [True, False, True] and m["flags"][0] is True
        assert m["numbers"] == [-5, 7]
        assert [m[k] for k in ("u8", "i8", "u16", "i16", "u64", "i64")] == [
            200,
            -100,
            60000,
            -30000,
            1 << 60,
            -(1 << 60),
        ]
        assert (m["f32"], m["f64"], m["yes"], m["text"]) == (0.25, 1 / 3, True, "ä")
        assert "nothing" not in m and m.get("nothing") is None and m.array_length("f32") is None
        assert [(t.name, t.shape, t.type.name) for t in file.tensors.values()] == [
            ("a", (4, 64), "F32"),
            ("b", (5,), "F16"),
            ("q", (4, 64), "Q8_0"),
        ]
        np.testing.assert_array_equal(file.read_rows(file.tensors["a"], 1, 3).view(np.float32), a[1:3])
        np.testing.assert_array_equal(file.read_rows(file.tensors["b"], 0, 1).view(np.float16)[0], b)
        np.testing.assert_array_equal(file.read_rows(file.tensors["q"], 3, 4), q[3:4])


def test_alignment_of_the_file_is_honoured(write: Callable[[bytes], Path]) -> None:
    values = struct.pack("<2f", 1.5, 2.5)
    data = gguf_bytes(
        [key("general.alignment", U32, struct.pack("<I", 256))], [tensor("x", [2], 0, 0)], values, alignment=256
    )
    with GgufFile(write(data)) as file:
        assert file.tensors["x"].offset % 256 == 0
        assert file.read_rows(file.tensors["x"], 0, 1).tobytes() == values


X = tensor("x", [32], 0, 0)
DATA = bytes(128)
BROKEN = {
    "empty": b"",
    "short": b"GGUF\3\0\0\0",
    "magic": gguf_bytes(magic=b"GGML"),
    "text": b"this is a text, not a model" * 10,
    "key count": gguf_bytes(n_keys=1 << 63),
    "key count within the file": gguf_bytes(n_keys=100, data=bytes(2000)),
    "tensor count": gguf_bytes(n_tensors=(1 << 64) - 1),
    "tensor count a bit too high": gguf_bytes([], [X], DATA, n_tensors=3),
    "key name length": gguf_bytes([struct.pack("<Q", 1 << 62) + b"abc"], data=DATA),
    "value type": gguf_bytes([key("k", 77, b"1234")], data=DATA),
    "string length": gguf_bytes([key("k", STRING, struct.pack("<Q", 1 << 40))], data=DATA),
    "array length": gguf_bytes([key("k", ARRAY, struct.pack("<IQ", U32, 1 << 61))], data=DATA),
    "string array length": gguf_bytes([key("k", ARRAY, struct.pack("<IQ", STRING, 1 << 61))], data=DATA),
    "string array element": gguf_bytes([key("k", ARRAY, struct.pack("<IQQ", STRING, 2, 1 << 63))], data=DATA),
    "array of arrays": gguf_bytes([key("k", ARRAY, struct.pack("<IQ", ARRAY, 1))], data=DATA),
    "key twice": gguf_bytes([key("k", U32, bytes(4))] * 2, data=DATA),
    "alignment 0": gguf_bytes([key("general.alignment", U32, bytes(4))], data=DATA),
    "alignment 48": gguf_bytes([key("general.alignment", U32, struct.pack("<I", 48))], data=DATA),
    "alignment true": gguf_bytes([key("general.alignment", BOOL, b"\1")], data=DATA),
    "alignment list": gguf_bytes([key("general.alignment", ARRAY, struct.pack("<IQI", U32, 1, 32))], data=DATA),
    "dimensions": gguf_bytes([], [text("x") + struct.pack("<I", 1 << 30)], DATA),
    "tensor name length": gguf_bytes([], [tensor("x" * 257, [32], 0, 0)], DATA),
    "escape sequence in a name": gguf_bytes([key("a\x1b[2Jb\n", 77, b"1234")], data=DATA),
    "no dimensions": gguf_bytes([], [text("x") + struct.pack("<IIQ", 0, 0, 0)], DATA),
    "dimension 0": gguf_bytes([], [tensor("x", [0, 5], 0, 0)], DATA),
    "dimension product": gguf_bytes([], [tensor("x", [1 << 62, 1 << 62, 1 << 62, 1 << 62], 0, 0)], DATA),
    "tensor type": gguf_bytes([], [tensor("x", [32], 200, 0)], DATA),
    "removed tensor type": gguf_bytes([], [tensor("x", [32], 4, 0)], DATA),
    "block": gguf_bytes([], [tensor("x", [33], 2, 0)], DATA),
    "tensor twice": gguf_bytes([], [X, X], DATA),
    "tensor beyond the end": gguf_bytes([], [X], DATA[:-1]),
    "offset beyond the end": gguf_bytes([], [tensor("x", [32], 0, 1 << 40)], DATA),
    "offset that overflows": gguf_bytes([], [tensor("x", [32], 0, (1 << 64) - 32)], DATA),
    "offset not aligned": gguf_bytes([], [tensor("x", [16], 0, 4)], DATA),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_one_clear_error(name: str, write: Callable[[bytes], Path]) -> None:
    path = write(BROKEN[name])
    with pytest.raises(ModelError) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) < 500
    assert not isinstance(caught.value, UnsupportedModelError)
    assert any(remedy in message for remedy in ("fetch it again", "give a .gguf file"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gguf_bytes(version=1), "version 1"),
        (gguf_bytes(version=4), "version 4"),
        (gguf_bytes(version=3 << 24), "big-endian"),
        (gguf_bytes([], [tensor("w", [256, 2], 16, 0)], bytes(1000)), "tensor w is of type IQ2_XXS"),
        (gguf_bytes([], [tensor("w", [256, 2], 22, 0)], bytes(1000)), "IQ2_S"),
    ],
)
def test_what_is_sound_but_not_supported_is_named(data: bytes, words: str, write: Callable[[bytes], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        GgufFile(write(data))


def test_every_truncation_of_a_file_is_an_error(write: Callable[[bytes], Path]) -> None:
    whole = gguf_bytes(
        [
            key("general.architecture", STRING, text("llama")),
            key("list", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("bc") + text("")),
            key("numbers", ARRAY, struct.pack("<IQ", F32, 2) + bytes(8)),
        ],
        [tensor("x", [32], 0, 0), tensor("y", [32, 2], 2, 128)],
        bytes(128 + 36),
    )
    GgufFile(write(whole)).close()
    for length in range(len(whole)):
        with pytest.raises(ModelError):
            GgufFile(write(whole[:length]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_change_of_bytes_does_more_than_raise_a_model_error(tmp_path: Path, data: Any) -> None:
    whole = bytearray(
        gguf_bytes(
            [
                key("general.alignment", U32, struct.pack("<I", 32)),
                key("list", ARRAY, struct.pack("<IQ", STRING, 3) + text("a") + text("bc") + text("")),
                key("i", I64, bytes(8)),
            ],
            [tensor("x", [32], 0, 0), tensor("y", [32, 2], 2, 128)],
            bytes(128 + 36),
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(whole)
    try:
        with GgufFile(path) as file:
            for name in file.metadata:
                file.metadata[name]
            for t in file.tensors.values():
                file.read_rows(t, 0, t.shape[0] if len(t.shape) > 1 else 1)
    except ModelError as error:
        assert str(path) in str(error)


def test_a_missing_file_a_directory_and_an_unreadable_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="cannot be read"):
        GgufFile(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelError, match="cannot be read"):
        GgufFile(tmp_path / "pipe.gguf")
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(gguf_bytes())
    secret.chmod(0)
    user = os.geteuid()
    if user == 0:  # who reads everything
        os.seteuid(65534)
    try:
        with pytest.raises(ModelError, match=r"cannot be read \(Permission denied\); check its permissions"):
            GgufFile(secret)
    finally:
        os.seteuid(user)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_not_a_crash(write: Callable[[bytes], Path]) -> None:
    path = write(gguf_bytes([], [tensor("x", [1024, 1024], 0, 0)], bytes(1 << 22)))
    with GgufFile(path) as file:
        os.truncate(path, 1 << 20)
        with pytest.raises(ModelError, match="ends within x"):
            file.read_rows(file.tensors["x"], 0, 1024)
