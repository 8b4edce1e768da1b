"""The C++ core as Python sees it: its contract (_core.pyi), errors, arrays, threads, signals."""

from __future__ import annotations

import ast
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import packed_numpy
import pytest
from sparse_run.errors import (
    BudgetError,
    Cancelled,
    ContextLengthError,
    Error,
    ModelError,
    UnsupportedModelError,
    UsageError,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("core")
    packed_numpy.make(path, {"n_ctx_train": 20000}, {})
    return path


@pytest.fixture(scope="module")
def slow_packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose prompts take long enough to be interrupted."""
    path = tmp_path_factory.mktemp("slow")
    packed_numpy.make(path, {"n_ctx_train": 20000, "n_layers": 8, "n_embd": 256, "n_ff": 1024}, {})
    return path


def tokens(n: int) -> Any:
    return np.random.default_rng(0).integers(0, 101, n).astype(np.int32)


def test_the_module_has_what_its_stub_says() -> None:
    from sparse_run import _core

    tree = ast.parse((ROOT / "python" / "sparse_run" / "_core.pyi").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert callable(getattr(_core, node.name)), node.name
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    assert hasattr(getattr(_core, node.name), member.name), f"{node.name}.{member.name}"
    public = {name for name in dir(_core) if not name.startswith("_")}
    named = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert public == named


def test_importing_the_core_does_not_import_numpy() -> None:
    code = "import sys; from sparse_run import _core; _core.cpu_info(); sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_facts_about_the_processor() -> None:
    from sparse_run import _core

    info = _core.cpu_info()
    assert info["brand"] and 1 <= info["allowed_cores"] <= info["physical_cores"]
    assert info["default_threads"] == _core.default_threads() >= 1
    isas = _core.isa_list()
    assert sum(isa["selected"] for isa in isas) == 1
    assert all(isa["supported"] for isa in isas if isa["selected"])
    assert isas[-1]["name"] == "generic" and isas[-1]["supported"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_default_threads_follow_the_affinity_mask() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
        "from sparse_run import _core; print(_core.default_threads(), _core.cpu_info()['allowed_cores'])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"]


def test_stream_rate_is_plausible_and_its_arguments_are_checked() -> None:
    from sparse_run import _core

    rates = _core.stream_gb_per_s(2, 64, 3)
    assert len(rates) == 3 and all(0.05 < rate < 5000 for rate in rates)
    for arguments in ((0, 64, 1), (1, 0, 1), (1, 64, 0)):
        with pytest.raises(UsageError):
            _core.stream_gb_per_s(*arguments)


def test_pack_and_unpack_check_what_they_get() -> None:
    from sparse_run import _core

    codes = np.zeros((70, 40), dtype=np.uint8)
    scales = np.ones((70, 2), dtype=np.float16)
    panel = _core.pack_panel("q4", codes, scales, None, 32)
    assert panel.dtype == np.uint8 and panel.size == _core.panel_bytes("q4", 70, 40, 32, False)
    assert np.array_equal(_core.unpack_panel("q4", panel, 70, 40, 32, False), np.full((70, 40), -8, dtype=np.float32))
    for arguments in (
        ("q3", codes, scales, None, 32),
        ("f32", codes, scales, None, 32),
        ("q4", codes, scales, None, 31),
        ("q4", codes + 16, scales, None, 32),
        ("q4", codes.astype(np.int32), scales, None, 32),
        ("q4", codes[0], scales, None, 32),
        ("q4", codes, scales.astype(np.float32), None, 32),
        ("q4", codes, scales[:, :1], None, 32),
        ("q4", codes, scales, scales[1:], 32),
    ):
        with pytest.raises(UsageError):
            _core.pack_panel(*arguments)
    with pytest.raises(UsageError):
        _core.unpack_panel("q4", panel[:-1], 70, 40, 32, False)
    with pytest.raises(UsageError):
        _core.pack_panel_float("f32", np.zeros((65, 8), dtype=np.float32))
    # Arrays in another order of memory are read as what they are.
    odd = np.asfortranarray(np.arange(70 * 40, dtype=np.uint8).reshape(70, 40) % 16)
    plain = np.ascontiguousarray(odd)
    assert np.array_equal(
        _core.pack_panel("q4", odd, scales, None, 32), _core.pack_panel("q4", plain, scales, None, 32)
    )


def test_a_list_of_tokens_is_an_array_of_them(packed: Path) -> None:
    from sparse_run import _core

    model = _core.Model(str(packed), 1)
    one, other = _core.Session(model, 8), _core.Session(model, 8)
    one.eval(tokens(5))
    other.eval(tokens(5).tolist())
    assert np.array_equal(one.logits(), other.logits()) and one.n_past == other.n_past == 5


def test_errors_have_their_classes(packed: Path, tmp_path: Path) -> None:
    from sparse_run import _core

    with pytest.raises(ModelError, match="config.json"):
        _core.Model(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="threads"):
        _core.Model(str(packed), -3)
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "config.json").write_text('{"format_version": 7}')
    with pytest.raises(UnsupportedModelError, match="format 7"):
        _core.Model(str(newer))
    model = _core.Model(str(packed), 2)
    session = _core.Session(model, 8)
    with pytest.raises(ContextLengthError, match="context of 8"):
        session.eval(tokens(9))
    with pytest.raises(UsageError, match="n_ctx"):
        _core.Session(model, -1)
    with pytest.raises(UsageError, match="temperature"):
        _core.Sampler(temperature=-1)
    with pytest.raises(UsageError, match="logits"):
        session.logits()
    with pytest.raises(UsageError, match="vocabulary of 101"):
        session.eval(np.array([101], dtype=np.int32))
    wrong: Any
    for wrong in (tokens(3).astype(np.int64), tokens(4).reshape(2, 2), np.zeros(3)):
        with pytest.raises(UsageError, match="tokens must be a 1-dimensional array of int32"):
            session.eval(wrong)
    with pytest.raises(TypeError):
        session.eval((1, 2, 3))  # type: ignore[arg-type]
    for wrong in (["1"], [1.5], [2**31]):
        with pytest.raises((UsageError, TypeError, RuntimeError)):
            session.eval(wrong)
    with pytest.raises(UsageError, match="no tokens"):
        session.eval([])
    with pytest.raises(UsageError, match="no tokens"):
        session.eval(tokens(0))
    with pytest.raises(UsageError, match="float32"):
        _core.Sampler().sample(np.zeros(4))  # type: ignore[arg-type]
    assert session.n_past == 0
    session.eval(tokens(16)[::2])  # not contiguous, but the right type
    assert session.tokens == tokens(16)[::2].tolist()


def test_a_context_beyond_all_memory_is_a_budget_error(packed: Path) -> None:
    resource = pytest.importorskip("resource")
    from sparse_run import _core

    model = _core.Model(str(packed), 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))
    try:
        with pytest.raises(BudgetError, match="MB"):
            _core.Session(model, 1 << 22)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    _core.Session(model, 64).eval(tokens(4))


def test_closing_a_model_leaves_its_sessions_alive(packed: Path) -> None:
    from sparse_run import _core

    model = _core.Model(str(packed), 2)
    assert model.threads == 2 and model.weight_bytes > 0 and 0 < model.bytes_per_token <= model.weight_bytes
    session = _core.Session(model, 64)
    session.eval(tokens(4))
    model.close()
    model.close()
    for name in ("threads", "config_json", "isa", "bytes_per_token"):
        with pytest.raises(UsageError, match="closed"):
            getattr(model, name)
    with pytest.raises(UsageError, match="closed"):
        _core.Session(model, 8)
    del model
    gc.collect()
    session.eval(tokens(5))
    assert session.n_past == 9


def test_logits_are_a_view_that_keeps_the_session_alive(packed: Path) -> None:
    from sparse_run import _core

    session = _core.Session(_core.Model(str(packed), 1), 64)
    all_logits = session.eval_all(tokens(7))
    view = session.logits()
    assert all_logits.shape == (7, 101) and view.shape == (101,) and view.dtype == np.float32
    assert np.array_equal(view, all_logits[-1])
    assert not view.flags.writeable
    assert np.shares_memory(view, session.logits())
    copy = view.copy()
    del session
    gc.collect()
    assert np.array_equal(view, copy)


def test_step_sample_and_sampler_agree(packed: Path) -> None:
    from sparse_run import _core

    model = _core.Model(str(packed), 2)
    a, b = _core.Session(model, 64), _core.Session(model, 64)
    sa, sb = _core.Sampler(seed=5, repeat_penalty=1.1), _core.Sampler(seed=5, repeat_penalty=1.1)
    assert sa.seed == 5
    a.eval(tokens(4))
    b.eval(tokens(4))
    chosen = [a.step(sa) for _ in range(10)]
    other = []
    for _ in range(10):
        token = sb.sample(b.logits())
        sb.accept(token)
        b.eval(np.array([token], dtype=np.int32))
        other.append(token)
    assert chosen == other
    stats = a.stats()
    assert stats["prompt_tokens"] == 4 and stats["decode_tokens"] == 10
    assert stats["prompt_seconds"] > 0 and stats["decode_seconds"] > 0
    assert a.sample(sa) in range(101) and a.n_past == 14
    assert a.kv_bytes > 0
    a.truncate(0)
    assert a.tokens == [] and a.kv_bytes == 0


def test_the_gil_is_free_while_a_prompt_is_computed_and_cancel_works(slow_packed: Path) -> None:
    from sparse_run import _core

    session = _core.Session(_core.Model(str(slow_packed), 1), 16000)
    failure: list[Error] = []

    def work() -> None:
        try:
            session.eval(tokens(16000))
        except Error as error:
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 60
    while session.n_past == 0 and time.monotonic() < deadline:  # Python runs on, or this would see 0 or 16000 only
        time.sleep(0.001)
    assert 0 < session.n_past < 16000
    with pytest.raises(UsageError, match="in use by another thread"):
        session.truncate(0)
    session.cancel()
    thread.join(60)
    assert len(failure) == 1 and isinstance(failure[0], Cancelled)
    assert session.n_past % 256 == 0
    session.eval(tokens(10))


def test_ctrl_c_interrupts_a_prompt(slow_packed: Path) -> None:
    from sparse_run import _core

    session = _core.Session(_core.Model(str(slow_packed), 1), 16000)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            session.eval(tokens(16000))
    finally:
        timer.join()
        signal.signal(signal.SIGINT, old)
    assert session.n_past < 16000
    session.eval(tokens(10))


def test_two_sessions_in_two_threads_share_a_model_and_a_sampler(packed: Path) -> None:
    from sparse_run import _core

    model = _core.Model(str(packed), 2)
    sampler = _core.Sampler(temperature=0.0, repeat_penalty=1.2)
    results: list[int] = []

    def work() -> None:
        session = _core.Session(model, 600)
        session.eval(tokens(300))
        for _ in range(100):
            session.step(sampler)
        results.append(session.n_past)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [400, 400]


def test_the_log_sink_hears_of_a_loaded_model_and_may_fail(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from sparse_run import _core

    heard: list[tuple[int, str]] = []
    _core.set_log_sink(lambda level, text: heard.append((level, text)))
    try:
        _core.Model(str(packed), 1)
    finally:
        _core.set_log_sink(None)
    assert len(heard) == 1 and heard[0][0] == 20 and str(packed) in heard[0][1]
    _core.Model(str(packed), 1)
    assert len(heard) == 1
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UsageError):
        _core.set_log_sink(3)  # type: ignore[arg-type]


def test_not_a_number_is_an_error_and_not_a_token(tmp_path: Path) -> None:
    from sparse_run import _core

    c, w = packed_numpy.make(tmp_path, {}, {})
    w["layers.1.attn_norm"][3] = np.nan
    packed_numpy.write(tmp_path, c, w, "f32")
    with pytest.raises(Error, match="not a number"):
        _core.Session(_core.Model(str(tmp_path), 1), 64).eval(tokens(3))
