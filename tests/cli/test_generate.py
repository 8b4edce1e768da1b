"""`sparse-run generate` as a process: prompts from three places, text and JSON, stop strings, limits, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sparse_run as sr

Run = Callable[..., "subprocess.CompletedProcess[str]"]
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def wanted(stories_packed: Path) -> str:
    with sr.Model(stories_packed) as model:
        return model.generate(PROMPT, temperature=0, max_tokens=24).read()


@pytest.fixture
def generate(run_cli: Run, stories_packed: Path) -> Run:
    def run(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return run_cli("generate", "-m", stories_packed, "-n", "24", "--temp", "0", *arguments, **options)

    return run


def test_the_prompt_comes_from_an_option_a_file_or_stdin(generate: Run, wanted: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    for done in (
        generate("-p", PROMPT),
        generate("-f", file),
        generate("-f", "-", input=PROMPT),
        generate(input=PROMPT),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (0, wanted + "\n", "")


def test_the_model_may_be_positional(run_cli: Run, stories_packed: Path, wanted: str) -> None:
    done = run_cli("generate", stories_packed, "-p", PROMPT, "-n", "24", "--temp", "0")
    assert done.stdout == wanted + "\n"


def test_json_is_one_object_with_documented_keys(generate: Run, wanted: str) -> None:
    done = generate("-p", PROMPT, "--json")
    value = json.loads(done.stdout)
    assert list(value) == ["schema", "text", "tokens", "finish_reason", "prompt_tokens", "timings"]
    assert value["schema"] == 1 and value["text"] == wanted and len(value["tokens"]) == 24
    assert value["finish_reason"] == "length" and value["prompt_tokens"] == 5
    assert {"prompt_tokens_per_s", "decode_tokens_per_s", "first_token_seconds"} <= set(value["timings"])
    assert done.stderr == ""


def test_stop_strings_may_be_repeated(generate: Run, wanted: str) -> None:
    stop = wanted[10:16]
    value = json.loads(generate("-p", PROMPT, "--json", "--stop", "never there", "--stop", stop).stdout)
    assert value["text"] == wanted[: wanted.index(stop)] and value["finish_reason"] == "stop"


def test_a_seed_repeats(run_cli: Run, stories_packed: Path) -> None:
    texts = [
        run_cli("generate", "-m", stories_packed, "-p", PROMPT, "-n", "24", "-s", seed, "--temp", "1.5").stdout
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_mapping_or_reading_the_weights_does_not_change_the_text(generate: Run, wanted: str) -> None:
    for choice in ("--mmap", "--no-mmap"):
        done = generate("-p", PROMPT, choice)
        assert (done.returncode, done.stdout, done.stderr) == (0, wanted + "\n", ""), choice
        both = generate("-p", PROMPT, choice, "--memory-budget", "200M")
        assert both.returncode == 2 and "--memory-budget" in both.stderr and not both.stdout


def test_threads_do_not_change_the_text(generate: Run, wanted: str) -> None:
    for threads in ("1", "2", "3"):
        assert generate("-p", PROMPT, "-t", threads).stdout == wanted + "\n"


def test_a_prompt_longer_than_the_context_is_exit_1_with_numbers(generate: Run) -> None:
    done = generate("-p", "word " * 300, "-c", "64")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "64" in done.stderr and "-c" in done.stderr


def test_the_end_of_the_context_ends_the_text(generate: Run) -> None:
    value = json.loads(generate("-p", PROMPT, "-c", "16", "-n", "-1", "--ignore-eos", "--json").stdout)
    assert value["finish_reason"] == "length" and len(value["tokens"]) == 16 - 5 + 1


def test_no_prompt_in_a_terminal_is_exit_2(stories_packed: Path) -> None:
    import pexpect

    child = pexpect.spawn(sys.executable, ["-m", "sparse_run", "generate", "-m", str(stories_packed)], timeout=30)
    child.expect("no prompt")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 2


def test_files_that_cannot_be_prompts_are_named(generate: Run, tmp_path: Path) -> None:
    missing = generate("-f", tmp_path / "missing.txt")
    assert missing.returncode == 1 and "missing.txt" in missing.stderr and "Traceback" not in missing.stderr
    binary = tmp_path / "latin1.txt"
    binary.write_bytes("caf\xe9".encode("latin-1"))
    done = generate("-f", binary)
    assert done.returncode == 2 and "latin1.txt is not UTF-8" in done.stderr


def test_undecodable_arguments_do_no_harm(stories_packed: Path) -> None:
    command = [sys.executable, "-m", "sparse_run", "generate", "-m", str(stories_packed), "-n", "4", "-p"]
    done = subprocess.run([*map(os.fsencode, command), b"a\xffb"], check=False, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_chat_applies_the_template(run_cli: Run, smollm2_packed: Path) -> None:
    done = run_cli(
        "generate",
        "-m",
        smollm2_packed,
        "--chat",
        "-sys",
        "Be brief.",
        "-p",
        "Say only: yes",
        "-n",
        "30",
        "--temp",
        "0",
    )
    with sr.Model(smollm2_packed) as model:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say only: yes"}]
        assert done.stdout.rstrip("\n") == model.chat(messages, temperature=0, max_tokens=30).read().rstrip("\n")


def test_verbose_adds_speed_on_stderr_and_quiet_takes_all_away(generate: Run, wanted: str) -> None:
    verbose = generate("-p", PROMPT, "-v")
    assert verbose.stdout == wanted + "\n" and "answer 24 tokens" in verbose.stderr
    assert "instruction set" in verbose.stderr  # the core's own log
    assert generate("-p", PROMPT, "-v", "-q").stderr == ""


def test_a_warning_is_seen_without_verbose(generate: Run) -> None:
    done = generate("-p", PROMPT, "-c", "600", "-n", "1")
    assert "the model was trained for 512" in done.stderr
    assert generate("-p", PROMPT, "-c", "600", "-n", "1", "-q").stderr == ""


def test_text_streams_and_ctrl_c_is_exit_130(smollm2_packed: Path) -> None:
    command = [sys.executable, "-m", "sparse_run", "generate", "-m", str(smollm2_packed), "-p", "Once", "-n", "-1"]
    with subprocess.Popen([*command, "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(20)  # the text comes while the rest is still to be made
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(30) == 130
        assert time.monotonic() - began < 5
        assert b"Traceback" not in process.stderr.read()
