"""bench, eval and doctor as a user runs them: what they print, where, and with which exit code."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference_numpy import load_llama2c, log_softmax

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def story_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside.\n" * 40, "utf-8")
    return path


class TestBench:
    def test_json_has_the_documented_keys(self, stories_packed: Path, run_cli: RunCli) -> None:
        done = run_cli("bench", "-m", stories_packed, "-t", 2, "--prompt", 40, "--gen", 5, "--reps", 3, "--json")
        assert done.returncode == 0, done.stderr
        r = json.loads(done.stdout)
        assert r["schema"] == 1
        for key in ("prompt_tokens_per_s", "decode_tokens_per_s"):
            assert len(r[key]) == 3 and all(rate > 0 for rate in r[key])
        assert r["prompt_median"] == sorted(r["prompt_tokens_per_s"])[1]
        assert r["decode_median"] == sorted(r["decode_tokens_per_s"])[1]
        assert r["threads"] == 2
        assert r["isa"] in ("generic", "avx2", "avx512", "neon")
        assert math.isclose(r["gb_per_s"], r["bytes_per_token"] * r["decode_median"] / 1e9)
        assert r["stream_gb_per_s"] > 0
        # Weights are 260 K float32; the process is Python with NumPy.
        assert 260_000 * 4 * 0.9 < r["bytes_per_token"] <= r["weight_bytes"] < 3_000_000
        assert 10_000_000 < r["peak_rss_bytes"] < 200_000_000
        assert len(r["token_hash"]) == 16

    def test_token_hash_tells_models_apart_and_not_runs(
        self, stories_packed: Path, smollm2_packed: Path, run_cli: RunCli
    ) -> None:
        words = ("--prompt", 16, "--gen", 1, "--reps", 1, "--json")
        hashes = []
        for path, threads in ((stories_packed, 1), (stories_packed, 2), (smollm2_packed, 2)):
            done = run_cli("bench", "-m", path, "-t", threads, *words)
            assert done.returncode == 0, done.stderr
            hashes.append(json.loads(done.stdout)["token_hash"])
        assert hashes[0] == hashes[1] != hashes[2]

    def test_table_is_for_people(self, stories_packed: Path, run_cli: RunCli) -> None:
        done = run_cli("bench", "-m", stories_packed, "--prompt", 8, "--gen", 2, "--reps", 1)
        assert done.returncode == 0, done.stderr
        assert [line.split()[0] for line in done.stdout.splitlines()] == [
            "model", "machine", "prompt", "decode", "memory", "peak", "tokens",
        ]  # fmt: skip
        assert "\x1b" not in done.stdout

    @pytest.mark.parametrize("option", ["--prompt", "--gen", "--reps", "--threads"])
    def test_zero_is_a_usage_error(self, option: str, stories_packed: Path, run_cli: RunCli) -> None:
        done = run_cli("bench", "-m", stories_packed, option, 0)
        assert done.returncode == 2
        assert option in done.stderr and not done.stdout

    def test_missing_model(self, run_cli: RunCli, tmp_path: Path) -> None:
        done = run_cli("bench", "-m", tmp_path / "no.gguf")
        assert done.returncode == 4
        assert "no.gguf" in done.stderr and not done.stdout


class TestEval:
    def test_perplexity_equals_the_reference(
        self, stories_dir: Path, stories_packed: Path, story_text: Path, run_cli: RunCli
    ) -> None:
        """The protocol and the numbers, against the independent forward pass: chunks, BOS, second halves."""
        from sentencepiece import SentencePieceProcessor

        ctx, chunks = 64, 3
        done = run_cli("eval", "-m", stories_packed, "--text", story_text, "--ctx", ctx, "--chunks", chunks, "--json")
        assert done.returncode == 0, done.stderr
        r = json.loads(done.stdout)
        sp = SentencePieceProcessor(model_file=str(stories_dir / "tok512.model"))
        ids = [sp.bos_id(), *sp.encode(story_text.read_text(encoding="utf-8"))]
        model, nll, count = load_llama2c(stories_dir / "stories260K.bin"), 0.0, 0
        for c in range(chunks):
            chunk = [sp.bos_id(), *ids[c * ctx + 1 : (c + 1) * ctx]]
            model.reset()
            logs = log_softmax(model.eval(chunk))
            for i in range(ctx // 2, ctx - 1):
                nll -= logs[i, chunk[i + 1]]
                count += 1
        assert r["tokens_scored"] == count == 93
        assert r["ctx"] == ctx and r["chunks"] == chunks
        assert math.isclose(r["perplexity"], math.exp(nll / count), rel_tol=1e-3)
        assert r["schema"] == 1 and r["seconds"] > 0

    def test_whole_text_and_fewer_chunks_than_asked(
        self, stories_packed: Path, story_text: Path, run_cli: RunCli
    ) -> None:
        whole = run_cli("eval", "-m", stories_packed, "--text", story_text, "--ctx", 256, "--chunks", 0, "--json")
        asked = run_cli("eval", "-m", stories_packed, "--text", story_text, "--ctx", 256, "--chunks", 999, "--json")
        assert whole.returncode == asked.returncode == 0, whole.stderr + asked.stderr
        a, b = json.loads(whole.stdout), json.loads(asked.stdout)
        assert a["chunks"] == b["chunks"] > 1
        assert a["perplexity"] == b["perplexity"]
        assert f"only {a['chunks']} chunks" in asked.stderr and "only" not in whole.stderr

    def test_text_from_standard_input(self, stories_packed: Path, story_text: Path, run_cli: RunCli) -> None:
        text = story_text.read_text(encoding="utf-8")
        words = ("eval", "-m", stories_packed, "--ctx", 64, "--chunks", 2, "--json", "--text")
        piped, named = run_cli(*words, "-", input=text), run_cli(*words, story_text)
        assert piped.returncode == 0, piped.stderr
        assert json.loads(piped.stdout)["perplexity"] == json.loads(named.stdout)["perplexity"]

    def test_text_too_short_is_one_clear_line(self, stories_packed: Path, tmp_path: Path, run_cli: RunCli) -> None:
        short = tmp_path / "short.txt"
        short.write_text("Once upon a time")
        done = run_cli("eval", "-m", stories_packed, "--text", short, "-q")
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert "short.txt" in done.stderr and "512" in done.stderr and not done.stdout

    def test_text_that_is_not_utf8(self, stories_packed: Path, tmp_path: Path, run_cli: RunCli) -> None:
        bad = tmp_path / "bad.txt"
        bad.write_bytes(b"Once \xff\xfe")
        done = run_cli("eval", "-m", stories_packed, "--text", bad, "-q")
        assert done.returncode == 2
        assert "bad.txt" in done.stderr and len(done.stderr.splitlines()) == 1

    def test_missing_text(self, stories_packed: Path, tmp_path: Path, run_cli: RunCli) -> None:
        done = run_cli("eval", "-m", stories_packed, "--text", tmp_path / "none.txt", "-q")
        assert done.returncode == 1
        assert "none.txt" in done.stderr and len(done.stderr.splitlines()) == 1

    def test_weights_that_are_not_numbers_are_an_error(
        self, stories_gguf: Path, story_text: Path, tmp_path: Path, run_cli: RunCli
    ) -> None:
        data = bytearray(stories_gguf.read_bytes())
        data[-4:] = np.float32("nan").tobytes()  # one weight of the last norm
        broken = tmp_path / "nan.gguf"
        broken.write_bytes(bytes(data))
        done = run_cli("eval", "-m", broken, "--text", story_text, "--ctx", 64, "-q", "--json")
        assert done.returncode in (1, 4)
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


class TestDoctor:
    def test_json_says_what_there_is(self, run_cli: RunCli, tmp_path: Path) -> None:
        done = run_cli("doctor", "--json", env={"XDG_CACHE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        r = json.loads(done.stdout)
        assert r["schema"] == 1 and r["problems"] == []
        p = r["processor"]
        assert p["brand"] and p["default_threads"] >= 1 and p["logical_cores"] == os.cpu_count()
        assert next(isa for isa in p["isas"] if isa["selected"])["name"] == p["isa"]
        # What the build holds, what runs here, how each was tested; generic is always there.
        assert p["isas"][-1] == {**p["isas"][-1], "name": "generic", "supported": True, "tested": "hardware"}
        assert {isa["tested"] for isa in p["isas"]} <= {"hardware", "emulator"}
        assert r["memory"]["available_bytes"] <= r["memory"]["total_bytes"]
        assert r["memory"]["stream_gb_per_s"] > 0
        packed = r["folders"]["packed"]
        assert packed["path"].startswith(str(tmp_path)) and packed["writable"] and packed["read_gb_per_s"] > 0
        assert all(r["packages"].values())
        assert r["extras"]["test"]["version"]
        assert not list(tmp_path.rglob("*")), "something was left behind"

    def test_text_ends_with_a_verdict(self, run_cli: RunCli) -> None:
        done = run_cli("doctor")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1].split() == ["verdict", "ready"]
        assert "\x1b" not in done.stdout

    def test_packages_are_those_of_the_project(self) -> None:
        from sparse_run.cli.doctor import OPTIONAL, REQUIRED

        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        listed = text.split("\ndependencies = [")[1].split("\n]")[0]
        assert sorted(REQUIRED) == sorted(re.findall(r'"([a-z0-9-]+)', listed))
        extras = dict(re.findall(r"^(\w+) = \[(.*)\]$", text.split("[project.optional-dependencies]")[1], re.MULTILINE))
        for extra, (package, _) in OPTIONAL.items():
            assert f'"{package}>' in extras[extra]
        assert set(extras) - {"dev"} >= set(OPTIONAL)

    def test_impossible_instruction_set_is_a_problem(self, run_cli: RunCli) -> None:
        done = run_cli("doctor", "--json", env={"SPARSE_RUN_FORCE_ISA": "sse9"})
        assert done.returncode == 3
        assert "sse9" in json.loads(done.stdout)["problems"][0]
        assert "sse9" in done.stderr and len(done.stderr.splitlines()) == 1

    def test_cache_that_cannot_be_written_is_a_problem(self, run_cli: RunCli, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("a file where a folder should be")
        done = run_cli("doctor", "--json", env={"XDG_CACHE_HOME": str(file)})
        assert done.returncode == 3
        assert str(file) in done.stderr and "XDG_CACHE_HOME" in done.stderr


class TestPrograms:
    """The programs of tests/bench run; what they measure is not tested."""

    @pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k", "f16"])
    def test_random_llama_of_every_type_runs(self, kind: str, tmp_path: Path, run_cli: RunCli) -> None:
        out = tmp_path / "random.gguf"
        script = ROOT / "tests" / "bench" / "make_random_llama.py"
        subprocess.run(
            [sys.executable, script, out, "--shape", "tiny", "--type", kind], check=True, capture_output=True
        )
        done = run_cli("bench", "-m", out, "--prompt", 16, "--gen", 2, "--reps", 1, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["decode_median"] > 0

    def test_random_llama_is_the_same_for_the_same_seed(self, tmp_path: Path) -> None:
        script = ROOT / "tests" / "bench" / "make_random_llama.py"
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            words = [sys.executable, script, tmp_path / name, "--shape", "tiny", "--seed", str(seed)]
            subprocess.run(words, check=True, capture_output=True)
        a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
        assert a == b != c

    def test_comparison_counts_no_failed_run(self, stories_gguf: Path, shared_dir: Path) -> None:
        script = ROOT / "tests" / "bench" / "compare_llamacpp.py"
        words = [
            sys.executable,
            script,
            stories_gguf,
            "--peer-python",
            shutil.which("false") or "/bin/false",
            "--pairs",
            "1",
        ]
        done = subprocess.run(
            [*words, "--peer-script", shared_dir / "peers" / "llamacpp_bench.py"],
            check=False, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 1
        assert not done.stdout and "no result" in done.stderr

    def test_startup_reports_time_and_memory(self, stories_packed: Path) -> None:
        script = ROOT / "tests" / "bench" / "startup.py"
        done = subprocess.run(
            [sys.executable, script, stories_packed, "--reps", "1"],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        r = json.loads(done.stdout)
        assert 0 < r["first_token_median"] <= r["total_median"]
        assert r["peak_rss_bytes"] > 10_000_000
