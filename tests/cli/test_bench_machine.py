"""`bench --gather` and `bench --breakeven`: form, refusals, and that what was measured reaches the engine."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sparse_run import _core
from sparse_run.bench import breakeven
from sparse_run.errors import UsageError
from sparse_run.packed_header import ROW_SITES, SITES, read_header
from sparse_run.predictors.teal.fit import Fit, Options
from sparse_run.sparsity import SparsityFile
from sparse_run.tokenizer import Tokenizer

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


class TestGather:
    def test_json_is_a_table_of_runs_and_densities(self, run_cli: RunCli) -> None:
        done = run_cli("bench", "--gather", "-t", 1, "--reps", 1, "--json")
        assert done.returncode == 0, done.stderr
        r = json.loads(done.stdout)
        assert r["schema"] == 1 and r["threads"] == 1 and r["cpu"] and r["isa"]
        assert r["densities"] == [1.0, 0.75, 0.5, 0.25, 0.1]
        assert len(r["gb_per_s"]) == len(r["runs"]) == 6
        rates = [rate for row in r["gb_per_s"] for rate in row]
        assert len(rates) == 30 and all(math.isfinite(rate) and rate > 0 for rate in rates)
        assert r["stream_gb_per_s"] > 0

    def test_table_has_a_line_for_each_run(self, run_cli: RunCli) -> None:
        done = run_cli("bench", "--gather", "-q", "--reps", 1)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.split()[0] for line in lines[2:]] == ["64", "256", "512", "1024", "2048", "4096"]
        assert not done.stderr

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (("--gather", "--breakeven"), "--breakeven"),
            (("--gather", "-m", "model.gguf"), "no model"),
            (("--gather", "--sparsity", "0.5"), "--sparsity"),
            (("--breakeven", "--sparsity", "0.5"), "--sparsity"),
            (("--gather", "--reps", "0"), "--reps"),
        ],
    )
    def test_what_does_not_fit_together_is_a_usage_error(
        self, words: tuple[str, ...], named: str, run_cli: RunCli
    ) -> None:
        done = run_cli("bench", *words)
        assert done.returncode == 2
        assert named in done.stderr and not done.stdout


class TestBreakEven:
    def test_json_names_every_shape_and_is_kept(self, smollm2_packed: Path, tmp_path: Path, run_cli: RunCli) -> None:
        env = {"XDG_CACHE_HOME": str(tmp_path)}
        done = run_cli("bench", "--breakeven", "-m", smollm2_packed, "-t", 2, "--reps", 1, "--json", env=env)
        assert done.returncode == 0, done.stderr
        r = json.loads(done.stdout)
        assert r["schema"] == 1 and r["threads"] == 2
        # SmolLM2-135M: 576 wide, 9 query and 3 key-value heads of 64, FFN of 1536.
        shapes = {(tuple(s["sites"]), s["rows"], s["cols"]) for s in r["shapes"]}
        assert shapes == {(("A",), 960, 576), (("O",), 576, 576), (("M",), 3072, 576), (("Z",), 576, 1536)}
        for s in r["shapes"]:
            assert len(s["gain"]) == len(r["densities"]) and all(g > 0 for g in s["gain"])
            assert 0 <= s["break_even"] <= 1
        assert r["break_even"] == min(s["break_even"] for s in r["shapes"])
        (file,) = (tmp_path / "sparse-run").glob("breakeven-*.json")
        assert r["cache"] == str(file)
        kept = json.loads(file.read_text())
        assert kept["schema"] == 1
        (entry,) = kept["models"].values()
        assert entry["break_even"] == r["break_even"] and entry["fingerprint"] == r["fingerprint"]

    def test_rows_of_neurons_are_measured_and_used(
        self, smollm2_neurons: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        env = {"XDG_CACHE_HOME": str(tmp_path)}
        done = run_cli("bench", "--breakeven", "-m", smollm2_neurons, "-t", 2, "--reps", 3, "--json", env=env)
        assert done.returncode == 0, done.stderr
        r = json.loads(done.stdout)
        rows = {s["sites"][0]: s for s in r["shapes"] if not s["panel_rows"]}
        assert {(site, s["rows"], s["cols"]) for site, s in rows.items()} == {("N", 1536, 576), ("G", 1536, 576)}
        # A tenth of the neurons is read faster than all gates first and then all up rows.
        assert rows["N"]["gain"][-1] > rows["G"]["gain"][0]
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        known = breakeven.known_break_evens(r["fingerprint"], r["isa"], 2, ROW_SITES)
        assert known == {site: s["break_even"] for site, s in rows.items()}
        columns = breakeven.known_break_evens(r["fingerprint"], r["isa"], 2)
        assert columns is not None and columns.keys() == {"A", "O", "Z"}
        # They reach a calibration, which knows nothing of rows.
        model, tokenizer = _core.Model(str(smollm2_neurons), 2), Tokenizer.load(smollm2_neurons)
        floors = dict(zip(SITES, Fit(model, tokenizer, read_header(smollm2_neurons), Options()).floors(), strict=True))
        for site, value in columns.items():
            assert floors[site] == pytest.approx(min(max(1 - value, 0.05), 0.5), abs=1e-6)

    def test_table_says_what_a_break_even_does(self, smollm2_packed: Path, tmp_path: Path, run_cli: RunCli) -> None:
        env = {"XDG_CACHE_HOME": str(tmp_path)}
        done = run_cli("bench", "--breakeven", "-m", smollm2_packed, "--reps", 1, "-q", env=env)
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()[2:-1]] == ["A", "O", "M", "Z"]
        assert done.stdout.splitlines()[-1].startswith("a product runs dense where more of its columns are kept")

    def test_a_cache_that_cannot_be_written_is_said(
        self, smollm2_packed: Path, tmp_path: Path, run_cli: RunCli
    ) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        env = {"XDG_CACHE_HOME": str(blocked)}
        done = run_cli("bench", "--breakeven", "-m", smollm2_packed, "--reps", 1, "--json", env=env)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["cache"] == ""
        assert "XDG_CACHE_HOME" in done.stderr

    def test_a_model_without_columns_to_skip_is_refused(self, stories_packed: Path, run_cli: RunCli) -> None:
        done = run_cli("bench", "--breakeven", "-m", stories_packed, "--json")
        assert done.returncode == 4
        assert "no columns can be skipped" in done.stderr.splitlines()[-1] and not done.stdout

    @pytest.mark.parametrize(
        ("gain", "expected"),
        [
            ([1.1, 1.2, 1.3], 1.0),
            ([0.7, 0.8, 0.9], 0.0),
            ([0.9, 1.1, 1.3], 0.9),
            ([0.8, 0.9, 1.1], 0.7),
            ([1.2, 0.9, 1.5], 1.0),  # one noisy value among its neighbours
            ([0.9, 1.5, 1.1], 0.95),  # 1.3 for both
        ],
    )
    def test_crossing(self, gain: list[float], expected: float) -> None:
        assert breakeven.crossing([1.0, 0.8, 0.6], gain) == pytest.approx(expected)


class TestKnown:
    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        path = breakeven.cache_path()
        path.parent.mkdir(parents=True)
        return path

    def keep(self, cache: Path, key: str, version: str, value: object) -> None:
        entry = {"version": version, "break_even": value, "shapes": [{"sites": ["M"], "break_even": value}]}
        cache.write_text(json.dumps({"schema": 1, "cpu": "x", "models": {key: entry}}))

    def test_is_found_for_the_same_model_set_and_threads_only(self, cache: Path) -> None:
        self.keep(cache, "abc avx2 2", _core.__version__, 0.7)
        assert breakeven.known_break_evens("abc", "avx2", 2) == {"M": 0.7}
        assert breakeven.known_break_evens("abc", "avx2", 1) is None
        assert breakeven.known_break_evens("abd", "avx2", 2) is None
        assert breakeven.known_break_evens("abc", "avx512", 2) is None

    @pytest.mark.parametrize("value", [None, "0.5", -0.1, 1.5, math.nan])
    def test_impossible_values_count_as_none(self, cache: Path, value: object) -> None:
        self.keep(cache, "abc avx2 2", _core.__version__, value)
        assert breakeven.known_break_evens("abc", "avx2", 2) is None

    def test_other_versions_and_damaged_files_count_as_none(self, cache: Path) -> None:
        self.keep(cache, "abc avx2 2", "0.0.0-other", 0.7)
        assert breakeven.known_break_evens("abc", "avx2", 2) is None
        for text in ("", "{", "[]", '{"schema": 2, "models": {}}', '{"schema": 1, "models": []}'):
            cache.write_text(text)
            assert breakeven.known_break_evens("abc", "avx2", 2) is None

    def test_reaches_the_engine(self, smollm2_packed: Path, cache: Path) -> None:
        header = read_header(smollm2_packed)
        model = _core.Model(str(smollm2_packed), 1)
        n = header.n_layers
        file = SparsityFile(
            method="teal", thresholds={"M": [np.full(1, 0.05, np.float32)] * n}, levels={}, dense_tokens=0,
            model_name="", fingerprint=header.fingerprint, shape=header.shape, quantisation=header.quantisation,
        )  # fmt: skip

        def body() -> float:
            session = _core.Session(model, 16)
            session.set_sparsity(file.plan(model))
            for token in (5, 6, 7):
                session.eval(np.array([token], np.int32))
            return session.density()["body"]

        assert body() < 0.99
        self.keep(cache, f"{header.fingerprint} {model.isa} 1", _core.__version__, 0.0)
        assert body() == 1.0


class TestCore:
    @pytest.mark.parametrize("arguments", [(0, 64), (1025, 64), (1, 3), (1, -1)])
    def test_impossible_sizes(self, arguments: tuple[int, int]) -> None:
        with pytest.raises(UsageError, match=r"must be from"):
            _core.MemoryBench(*arguments)

    @pytest.mark.parametrize(("run", "density"), [(63, 0.5), (1 << 30, 0.5), (64, 0.0), (64, 1.01), (64, math.nan)])
    def test_impossible_gathers(self, run: int, density: float) -> None:
        with pytest.raises(UsageError, match=r"run|density"):
            _core.MemoryBench(1, 8).gather(run, density)

    @pytest.mark.parametrize(
        ("shape", "named"),
        [
            (("f32", 32, False, 64, 64, 64), "f32"),
            (("q9", 32, False, 64, 64, 64), "q9"),
            (("q4", 8, False, 64, 64, 64), "group"),
            (("q4", 32, False, 0, 64, 64), "rows"),
            (("q4", 32, False, 64, 0, 64), "cols"),
            (("q4", 32, False, 64, 64, 96), "panel_rows"),
            (("q4", 32, False, 4096, 4096, 1024), "does not fit"),
        ],
    )
    def test_impossible_shapes(self, shape: tuple[str, int, bool, int, int, int], named: str) -> None:
        with pytest.raises(UsageError, match=named):
            _core.MemoryBench(1, 8).columns(*shape, 0.5)

    @pytest.mark.parametrize("kind", ["q4", "q5", "q6", "q8"])
    @pytest.mark.parametrize("group", [32, 16])
    def test_counts_the_bytes_it_reads(self, kind: str, group: int) -> None:
        memory = _core.MemoryBench(2, 16)
        rows, cols = 200, 100
        t = memory.columns(kind, group, True, rows, cols, 128, 0.5)
        held = 2 * _core.panel_bytes(kind, 128, cols, group, True)  # 128 + 128 padded rows
        assert t["dense_bytes"] == held
        assert 0 < t["sparse_bytes"] < held
        assert t["dense_seconds"] > 0 and t["sparse_seconds"] > 0
        assert memory.columns(kind, group, True, rows, 128, 128, 1.0)["sparse_bytes"] == pytest.approx(held)
