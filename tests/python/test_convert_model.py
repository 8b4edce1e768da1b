"""Whole conversions: every weight arrives, in the file's final order, in bounded memory, all or nothing."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_gguf import LlamaShape, byte_level_vocabulary, write_llama_gguf
from mixed_gguf import write_mixed
from packed_reader import read_packed, tensor_offsets
from sparse_run.convert import convert, convert_gguf
from sparse_run.convert.codes import Form
from sparse_run.convert.gguf_reader import GgufFile
from sparse_run.convert.rows import ArrayRows
from sparse_run.convert.writer import write_packed
from sparse_run.errors import Error, ModelError, UnsupportedModelError, UsageError

SHAPE = LlamaShape(n_layers=2, n_embd=256, n_heads=4, n_kv_heads=2, head_dim=64, n_ff=512, n_vocab=320, tied=False)
MIXES = {
    "f32": {"": "F32"},
    "f16": {"": "F16"},
    "bf16": {"": "BF16"},
    "q4_0": {"": "Q4_0"},
    "q4_1": {"": "Q4_1", "token_embd": "Q8_0"},
    "q5_0": {"": "Q5_0"},
    "q5_1": {"": "Q5_1", "output": "Q6_K"},
    "q8_0": {"": "Q8_0"},
    "q4_k_m": {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K"},
    "q3_k_m": {"": "Q3_K", "attn_v": "Q5_K", "ffn_down": "Q4_K", "output": "Q6_K"},
    "q2_k": {"": "Q2_K", "attn_v": "Q3_K", "ffn_down": "Q3_K", "output": "Q6_K"},
    "q5_k_m": {"": "Q5_K", "attn_v": "Q6_K", "ffn_down": "Q6_K"},
    "gate and up differ": {"": "Q4_0", "ffn_gate": "Q5_0", "ffn_up": "Q6_K"},
    "gate with minima": {"": "Q4_0", "ffn_gate": "Q4_1", "ffn_up": "Q8_0"},
    "gate floats": {"": "Q8_0", "ffn_gate": "F16", "attn_k": "BF16"},
}


def interleave(gate: np.ndarray[Any, Any], up: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rows = -(-gate.shape[0] // 64) * 64

    def padded(a: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.pad(a, ((0, rows - len(a)), (0, 0))).reshape(-1, 1, 64, a.shape[1])

    return np.concatenate([padded(gate), padded(up)], axis=1).reshape(2 * rows, -1)


def expected_tensors(w: dict[str, Any], shape: LlamaShape) -> dict[str, Any]:
    """The final tensors of models/format.md, fused by hand."""
    out = {"token_embd": w["token_embd.weight"], "output_norm": w["output_norm.weight"]}
    if not shape.tied:
        out["output"] = w["output.weight"]
    for i in range(shape.n_layers):
        b, n = f"blk.{i}.", f"layers.{i}."
        out[n + "attn_norm"], out[n + "ffn_norm"] = w[b + "attn_norm.weight"], w[b + "ffn_norm.weight"]
        out[n + "attn_qkv"] = np.concatenate([w[f"{b}attn_{p}.weight"] for p in "qkv"])
        out[n + "attn_o"] = w[b + "attn_output.weight"]
        out[n + "ffn_gate_up"] = interleave(w[b + "ffn_gate.weight"], w[b + "ffn_up.weight"])
        down = w[b + "ffn_down.weight"]
        out[n + "ffn_down"] = np.pad(down, ((0, 0), (0, -down.shape[1] % 64)))
    return out


def joined(tensors: dict[str, Any]) -> dict[str, Any]:
    """Parts NAME.0, NAME.1 ... put together."""
    out: dict[str, Any] = {}
    for name, value in tensors.items():
        stem, _, last = name.rpartition(".")
        if last.isdigit() and stem.endswith("attn_qkv"):
            out[stem] = np.concatenate([out[stem], value]) if stem in out else value
        else:
            out[name] = value
    return out


@pytest.mark.parametrize("name", MIXES)
def test_every_weight_of_a_model_arrives(name: str, tmp_path: Path) -> None:
    weights = write_mixed(tmp_path / "m.gguf", SHAPE, MIXES[name])
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tensors, layouts = read_packed(tmp_path / "out")
    expected = expected_tensors(weights, SHAPE)
    got = joined(tensors)
    assert got.keys() == expected.keys()
    for key, values in expected.items():
        # Only the K types round, their scales to half.
        exact = not any(kind.endswith("_K") for kind in MIXES[name].values())
        tolerance = 0 if exact and "minima" not in name else 1e-3 * np.abs(values).max()
        np.testing.assert_allclose(got[key], values, rtol=0, atol=tolerance, err_msg=key)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tied_embeddings"] is False and config["n_ff"] == 512 and config["format_version"] == 1
    kinds = {key: layout["kind"] for key, layout in layouts.items()}
    if name == "q4_k_m":
        assert kinds["layers.0.attn_qkv.0"] == "q4" and kinds["layers.0.attn_qkv.1"] == "q6"
        assert layouts["layers.0.attn_qkv.0"]["rows"] == 384
    if name == "gate and up differ":
        assert (kinds["layers.0.ffn_gate_up"], layouts["layers.0.ffn_gate_up"]["group"]) == ("q6", 16)
    if name == "gate with minima":
        assert kinds["layers.0.ffn_gate_up"] == "q8" and layouts["layers.0.ffn_gate_up"]["min"]
    if name == "gate floats":
        assert kinds["layers.0.ffn_gate_up"] == "f32"
        assert [kinds[f"layers.0.attn_qkv.{i}"] for i in range(3)] == ["q8", "bf16", "q8"]


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q8_0"])
def test_an_ffn_of_any_width_is_padded_with_zero_neurons(kind: str, tmp_path: Path) -> None:
    shape = LlamaShape(n_layers=1, n_embd=96, n_heads=3, n_kv_heads=1, head_dim=32, n_ff=160, n_vocab=300)
    weights = write_mixed(tmp_path / "m.gguf", shape, {"": kind})
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tensors, _ = read_packed(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_ff"] == 192 and config["tied_embeddings"] is True
    for key, values in expected_tensors(weights, shape).items():
        np.testing.assert_array_equal(tensors[key], values, err_msg=key)
    assert "output" not in tensors


def test_biases_and_frequency_factors_arrive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    factors = rng.uniform(1, 8, 32)
    extra = {
        "rope_freqs.weight": factors,
        "blk.0.attn_q.bias": rng.normal(size=256),
        "blk.0.attn_v.bias": rng.normal(size=128),
        "blk.1.attn_output.bias": rng.normal(size=256),
    }
    weights = write_mixed(tmp_path / "m.gguf", SHAPE, {"": "Q8_0"}, extra=extra)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tensors, _ = read_packed(tmp_path / "out")
    np.testing.assert_array_equal(tensors["rope_factors"], factors.astype(np.float32))
    bias = np.concatenate([weights["blk.0.attn_q.bias"], np.zeros(128), weights["blk.0.attn_v.bias"]])
    np.testing.assert_array_equal(tensors["layers.0.attn_qkv.bias"], bias.astype(np.float32))
    assert "layers.1.attn_qkv.bias" not in tensors
    np.testing.assert_array_equal(tensors["layers.1.attn_o.bias"], weights["blk.1.attn_output.bias"])


def test_the_real_model_arrives_bit_by_bit(smollm2_gguf: Path, smollm2_packed: Path) -> None:
    tensors, layouts = read_packed(smollm2_packed)
    file = GgufFile(smollm2_gguf)

    def weights(name: str, begin: int = 0, end: int | None = None) -> Any:
        tensor = file.tensors[name]
        data = file.read_rows(tensor, begin, end or tensor.shape[0])
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[tensor.type.name])

    for begin in (0, 20_000, 49_052):
        rows = weights("token_embd.weight", begin, begin + 100)
        np.testing.assert_array_equal(tensors["token_embd"][begin : begin + 100], rows)
    for i in (0, 13, 29):
        qkv = np.concatenate([weights(f"blk.{i}.attn_{p}.weight") for p in "qkv"])
        np.testing.assert_array_equal(tensors[f"layers.{i}.attn_qkv"], qkv)
        gate_up = interleave(weights(f"blk.{i}.ffn_gate.weight"), weights(f"blk.{i}.ffn_up.weight"))
        np.testing.assert_array_equal(tensors[f"layers.{i}.ffn_gate_up"], gate_up)
        np.testing.assert_array_equal(tensors[f"layers.{i}.ffn_down"], weights(f"blk.{i}.ffn_down.weight"))
    assert {layout["kind"] for layout in layouts.values()} == {"q4", "q8"}
    record = json.loads((smollm2_packed / "source.json").read_text())
    assert record["sha256"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    file.close()
    assert record["size"] == smollm2_gguf.stat().st_size and record["tensor_types"]["Q4_1"] == 210


def test_every_tensor_begins_at_a_page_and_the_file_has_no_holes(smollm2_packed: Path) -> None:
    offsets = tensor_offsets(smollm2_packed)
    for name, (begin, _) in offsets.items():
        assert name.startswith("__pad__.") or begin % 4096 == 0, name
    spans = sorted(offsets.values())
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    size = (smollm2_packed / "weights.safetensors").stat().st_size
    assert spans[-1][1] == size
    assert size < sum(end - begin for name, (begin, end) in offsets.items() if not name.startswith("__")) * 1.01


def test_a_conversion_needs_less_than_twice_the_largest_tensor_and_200_mb(tmp_path: Path) -> None:
    # 128 MB of F32 in one tensor and 320 MB in the file: holding the file or the tensor three times would show.
    shape = LlamaShape(n_layers=4, n_embd=1024, n_heads=8, n_kv_heads=8, head_dim=128, n_ff=2816, n_vocab=32768)
    write_mixed(tmp_path / "m.gguf", shape, {"": "F32"})
    code = (
        "import sys; from sparse_run.convert import convert; convert(sys.argv[1], sys.argv[2]);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.gguf"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = 1024 * int(done.stdout)
    largest = 32768 * 1024 * 4
    assert peak < 2 * largest + 200e6
    assert peak < 200e6, "slices of rows need far less than the bound"


def test_progress_begins_at_once_and_ends_with_everything(tmp_path: Path) -> None:
    write_mixed(tmp_path / "m.gguf", SHAPE, {"": "Q4_0"})
    calls: list[tuple[str, int, int]] = []
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out", lambda *call: calls.append(call))
    done, totals = [c[1] for c in calls], {c[2] for c in calls}
    assert done == sorted(done) and done[0] == 0
    assert totals == {done[-1]} == {(tmp_path / "out" / "weights.safetensors").stat().st_size}
    assert "m.gguf" in calls[0][0]


def write_with(path: Path, change: Any = None, skip: str = "", **options: Any) -> Path:
    """A sound small model, but for one change of its shape or one missing tensor."""
    shape = LlamaShape(n_layers=1, n_embd=64, n_heads=2, n_kv_heads=1, head_dim=32, n_ff=64, n_vocab=300)
    write_mixed(path, shape, {"": "Q8_0"}, **options)
    if change or skip:
        reader = gguf.GGUFReader(path)
        out = path.with_suffix(".changed")
        writer = gguf.GGUFWriter(str(out), "llama")
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture" or field.name == skip:
                continue
            kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
            value = (change or {}).get(field.name, field.contents())
            writer.add_key_value(field.name, value, kind, sub_type=sub)
        for t in reader.tensors:
            if t.name != skip:
                writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        out.replace(path)
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"skip": "blk.0.attn_k.weight"}, "tensor blk.0.attn_k.weight is missing"),
        ({"skip": "llama.embedding_length"}, "llama.embedding_length is missing"),
        ({"change": {"llama.attention.head_count": 0}}, "llama.attention.head_count is 0"),
        ({"change": {"llama.attention.head_count_kv": 3}}, "2 attention heads cannot share 3"),
        ({"change": {"llama.attention.head_count": 4}}, "tensor blk.0.attn_q.weight has the shape [64, 64]"),
        ({"change": {"llama.feed_forward_length": 128}}, "tensor blk.0.ffn_"),
        ({"change": {"llama.block_count": 2}}, "tensor blk.1"),
        ({"change": {"llama.block_count": 1 << 31}}, "llama.block_count is 2147483648"),
        ({"change": {"llama.attention.layer_norm_rms_epsilon": float("nan")}}, "is nan"),
        ({"change": {"llama.rope.dimension_count": 48}}, "48 rotated dimensions"),
        ({"skip": "tokenizer.ggml.tokens"}, "no tokenizer"),
        ({"extra": {"blk.0.attn_sinks.weight": np.zeros(2)}}, "tensor blk.0.attn_sinks.weight belongs to no part"),
        ({"extra": {"blk.7.attn_norm.weight": np.zeros(64)}}, "tensor blk.7.attn_norm.weight belongs to no part"),
        ({"extra": {"rope_freqs.weight": np.full(16, np.nan)}}, "rope_freqs.weight holds weights that are not finite"),
        ({"extra": {"rope_freqs.weight": np.zeros(16)}}, "RoPE factors that are not positive"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_models_that_contradict_themselves_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf", **options)
    with pytest.raises(ModelError) as caught:
        convert_gguf(path, tmp_path / "out")
    assert words in str(caught.value) and str(path) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    with open(path, "r+b") as file:
        file.seek(int(tensor.data_offset))
        file.write(np.float16("inf").tobytes())
    with pytest.raises(ModelError, match=r"tensor blk.0.ffn_up.weight holds weights that are not finite"):
        convert_gguf(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba9")
    writer.add_token_list(["a"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"'mamba9' is not supported; supported: .*llama"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_a_part_of_a_split_model_is_told_as_such(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="one of 3 parts"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_an_existing_destination_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not a packed model"):
        convert(path, tmp_path / "docs", existing="replace")
    assert (tmp_path / "docs" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    convert(path, tmp_path / "empty")
    (tmp_path / "empty" / "source.json").write_text("{}")
    with pytest.raises(UsageError, match="exists already"):
        convert(path, tmp_path / "empty")
    assert (tmp_path / "empty" / "source.json").read_text() == "{}"
    convert(path, tmp_path / "empty", existing="replace")
    assert "sha256" in json.loads((tmp_path / "empty" / "source.json").read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["docs", "empty", "m.gguf"]


def test_a_source_that_changes_meanwhile_gives_no_model(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf")

    def touch(*_: object) -> None:
        os.utime(path, (1, 1))

    with pytest.raises(ModelError, match="changed while it was being converted"):
        convert(path, tmp_path / "out", progress=touch)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def _convert_process(src: Path, dst: Path, prepare: str, existing: str = "keep") -> subprocess.Popen[str]:
    code = f"import sys\n{prepare}\nfrom sparse_run.convert import convert\n"
    code += f"convert(sys.argv[1], sys.argv[2], existing={existing!r}, progress=step)"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(src), str(dst)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code = (
        "import sys; from sparse_run.convert import convert; from sparse_run.errors import Error\n"
        "try: convert(sys.argv[1], sys.argv[2])\n"
        "except Error as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "out")],
        preexec_fn=limited,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        done.stdout.startswith("Error ") and "free some space" in done.stdout and str(tmp_path / "out") in done.stdout
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_too_little_free_space_is_said_before_the_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_with(tmp_path / "m.gguf")
    real = os.fstatvfs
    monkeypatch.setattr(
        os, "fstatvfs", lambda fd: os.statvfs_result((*real(fd)[:3], 1, 1, *real(fd)[5:])), raising=True
    )
    calls: list[object] = []
    with pytest.raises(Error, match="free on the disk"):
        convert(path, tmp_path / "out", progress=lambda *call: calls.append(call[1]))
    assert calls in ([], [0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="cannot be written") as caught:
        convert(path, tmp_path / "file" / "out")
    assert not isinstance(caught.value, ModelError)


def test_a_killed_conversion_leaves_no_model_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf")
    (tmp_path / "o").mkdir()
    # It goes no further however long the other one takes.
    held = "import threading\ndef step(*call):\n  print('at', *call, flush=True)\n  call[1] and threading.Event().wait()"
    process = _convert_process(path, tmp_path / "o" / "out", held)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("at") and int(line.split()[-2]) > 0:
            break
    left = list((tmp_path / "o").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".out")

    other = _convert_process(path, tmp_path / "o" / "other", "def step(*call): pass")
    _, errors = other.communicate(timeout=600)
    assert other.returncode == 0, errors
    assert left[0].exists(), "a living process keeps its temporary directory"

    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == sorted([left[0].name, "other"])
    convert(path, tmp_path / "o" / "out")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["other", "out"]


@pytest.mark.parametrize("existing", ["keep", "overwrite"])
def test_processes_making_the_same_model_do_not_disturb_each_other(existing: str, tmp_path: Path) -> None:
    path = write_with(tmp_path / "m.gguf")
    convert(path, tmp_path / "alone")
    gate = tmp_path / "gate"
    wait = f"import os, time\ndef step(*call):\n  while not os.path.exists({str(gate)!r}): time.sleep(0.01)"
    racers = [_convert_process(path, tmp_path / "out", wait, existing) for _ in range(3)]
    time.sleep(0.5)
    gate.write_text("")
    for racer in racers:
        _, errors = racer.communicate(timeout=60)
        assert racer.returncode == 0, errors
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "gate", "m.gguf", "out"]
    for name in ("weights.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_tests_can_make_packed_models_from_arrays(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(70, 33)).astype(np.float32)
    write_packed(tmp_path / "m", {"n_embd": 33}, {"token_embd": ArrayRows(values, "f16"), "output_norm": np.ones(33)})
    tensors, layouts = read_packed(tmp_path / "m")
    np.testing.assert_array_equal(tensors["token_embd"], values.astype(np.float16).astype(np.float32))
    assert tensors["output_norm"].dtype == np.float32
    assert layouts["token_embd"]["kind"] == Form("f16").kind
    shutil.rmtree(tmp_path / "m")


def test_no_conversion_without_a_vocabulary_of_the_right_size(tmp_path: Path) -> None:
    shape = LlamaShape(n_layers=1, n_embd=64, n_heads=2, n_kv_heads=1, head_dim=32, n_ff=64, n_vocab=300)
    path = write_with(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="tokens"):
        write_llama_gguf(path, shape, [], byte_level_vocabulary(301))
    path = write_with(tmp_path / "m.gguf", change={"tokenizer.ggml.tokens": [f"t{i}" for i in range(299)]})
    with pytest.raises(ModelError, match=r"token_embd.weight has the shape \[300, 64\]"):
        convert_gguf(path, tmp_path / "out")
