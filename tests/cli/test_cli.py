"""What all commands share: help without imports, exit codes, one line per error, environment variables, closed pipes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sparse_run import errors
from sparse_run.cli import COMMANDS
from sparse_run.cli.common import Progress

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a command that failed."""
    lines = done.stderr.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("sparse-run: error: "), done.stderr
    assert done.stdout == ""
    return lines[0]


def test_help_lists_every_command_and_imports_none() -> None:
    program = (
        "import sys; from sparse_run.cli import main; code = main(['--help'])\n"
        "print(code, sorted({'numpy', 'tokenizers', 'jinja2', 'sparse_run.model', 'sparse_run._core',"
        " 'sparse_run.cli.chat'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout
    assert done.stdout.endswith("0 []\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_its_options(name: str, run_cli: Run) -> None:
    done = run_cli(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: sparse-run ") and "--help" in done.stdout


def test_version_names_the_instruction_set(run_cli: Run) -> None:
    done = run_cli("--version")
    assert done.returncode == 0 and done.stdout.startswith("sparse-run ") and "instruction set " in done.stdout
    forced = run_cli("--version", env={"SPARSE_RUN_FORCE_ISA": "generic"})
    assert "instruction set generic;" in forced.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["generate", "--no-such-option"],
        ["generate", "-p", "x", "-f", "y"],
        ["generate", "-p", "x", "-n", "many"],
        ["generate", "-p", "x", "-t", "0"],
        ["generate", "-p", "x", "--temp", "-1"],
        ["generate", "-p", "x", "--top-p", "nan"],
        ["generate", "-p", "x", "--top-k", str(10**20)],
        ["generate", "-p", "x", "--repeat-last-n", str(2**31)],
        ["calibrate", "--seed", str(10**20)],
        ["train-predictor", "--seed", str(2**32)],
        ["train-predictor", "--recall", "nan"],
        ["generate", "one-model", "-m", "other-model", "-p", "x"],
        ["generate", "-p", "x", "-sys", "y"],
        ["chat", "--chat-template", "no-such-template"],
    ],
)
def test_a_wrong_command_line_is_exit_2(arguments: list[str], run_cli: Run) -> None:
    done = run_cli(*arguments)
    assert done.returncode == 2 and done.stdout == "" and "rror" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_model_is_exit_4_and_one_line(run_cli: Run, tmp_path: Path) -> None:
    for command in ("generate", "chat"):
        for model in (tmp_path / "nothing.gguf", "no-such-name", tmp_path):
            done = run_cli(command, "-m", model, "-p", "x")
            assert done.returncode == 4, done.stderr
            assert str(model) in error_line(done)


def test_an_unreadable_model_is_exit_4(run_cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF" + os.urandom(200))
    done = run_cli("generate", "-m", file, "-p", "x")
    assert done.returncode == 4 and "broken.gguf" in error_line(done)


def test_a_forced_instruction_set_that_is_missing_fails_loudly(run_cli: Run, stories_packed: Path) -> None:
    done = run_cli("generate", "-m", stories_packed, "-p", "x", env={"SPARSE_RUN_FORCE_ISA": "sse9"})
    assert done.returncode == 1 and "sse9" in error_line(done)


def test_environment_variables_set_long_options_and_flags_win(run_cli: Run, stories_packed: Path) -> None:
    base = ["generate", "-p", "Once upon", "--temp", "0", "--json"]
    environment = {"SPARSE_RUN_MODEL": str(stories_packed), "SPARSE_RUN_MAX_TOKENS": "3", "SPARSE_RUN_THREADS": "1"}
    assert len(json.loads(run_cli(*base, env=environment).stdout)["tokens"]) == 3
    assert len(json.loads(run_cli(*base, "-n", "5", env=environment).stdout)["tokens"]) == 5
    done = run_cli(*base, env={**environment, "SPARSE_RUN_MAX_TOKENS": "x"})
    assert done.returncode == 2 and "--max-tokens" in done.stderr


def test_a_context_that_no_machine_has_is_exit_2(run_cli: Run, stories_packed: Path) -> None:
    done = run_cli("generate", "-m", stories_packed, "-p", "x", "-c", 10**12)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "ctx_size is 1000000000000" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_complete_commands(shell: str, run_cli: Run) -> None:
    done = run_cli("completion", shell)
    assert done.returncode == 0 and "_SPARSE_RUN_COMPLETE" in done.stdout


def test_completion_knows_commands_and_options(run_cli: Run) -> None:
    def completed(words: str) -> str:
        environment = {
            "_SPARSE_RUN_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        }
        return run_cli(env=environment).stdout

    assert "generate" in completed("sparse-run ge")
    assert "--max-tokens" in completed("sparse-run generate --max")


def test_a_reader_that_leaves_early_is_no_error(stories_packed: Path) -> None:
    command = f"{sys.executable} -m sparse_run generate -m '{stories_packed}' -p Once -n 300 --ignore-eos"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -c 5"], check=False, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, b"", 5)


@pytest.mark.parametrize("error", [error for error in vars(errors).values() if isinstance(error, type)])
def test_each_error_has_its_exit_code_and_is_one_line(
    error: type[errors.Error], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raised(error("first line\nsecond line"), monkeypatch) == error.exit_code
    shown = capsys.readouterr().err
    if error is errors.Cancelled:
        assert shown == ""
    else:
        assert shown == "sparse-run: error: first line second line\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(28, "No space left on device", "/x"), 1, "/x: No space left on device; free some space"),
        (FileNotFoundError(2, "No such file or directory", "/x"), 1, "/x: No such file or directory; check the path"),
        (IsADirectoryError(21, "Is a directory", "/x"), 1, "/x: Is a directory; give a file"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied; check the permissions"),
        (MemoryError(), 5, "out of memory"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_failures_of_the_system_are_one_line(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sparse_run.cli._mute", lambda stream: None)
    assert raised(error, monkeypatch) == code
    assert text in capsys.readouterr().err


def raised(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a command that raises `error`."""
    import sparse_run.model
    from sparse_run.cli import main

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sparse_run.model.Model, "load", fail)
    return main(["generate", "-p", "x"])


def test_progress_is_short_where_nobody_watches() -> None:
    import io

    stream = io.StringIO()
    with Progress(stream=stream) as progress:
        for done in range(1001):
            progress("packing", done * 1000, 1_000_000)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "packing: 0%" and lines[-1] == "packing: 100%" and len(lines) == 11
    quiet = io.StringIO()
    with Progress(stream=quiet, quiet=True) as progress:
        progress("packing", 1, 2)
    assert quiet.getvalue() == ""


@pytest.mark.parametrize("importing", ["click", "sparse_run.cli", "sparse_run.cli.list_"])
def test_ctrl_c_before_the_command_runs_is_exit_130_and_nothing_else(importing: str) -> None:
    """Sent while a module is being imported: click, what needs it, and a command's own."""
    program = f"""
import os, signal, sys
class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == {importing!r}:
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting)
from sparse_run.__main__ import main
sys.argv = ["sparse-run", "list"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")  # click ends the line of ^C


def test_the_installed_command_begins_where_ctrl_c_is_handled(project_root: Path) -> None:
    assert 'sparse-run = "sparse_run.__main__:main"' in (project_root / "pyproject.toml").read_text("utf-8")


def test_output_is_text_even_without_utf8(run_cli: Run, stories_packed: Path) -> None:
    environment = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = run_cli("generate", "-m", stories_packed, "-p", "Zoë", "-n", "8", "--temp", "0", env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "code"),
    [("chat", "-p Hello -n 3", 0), ("chat", "", 0), ("generate", "-p Hello -n 3", 0), ("generate", "", 2)],
)
def test_a_closed_stdin_does_no_harm(command: str, arguments: str, code: int, stories_packed: Path) -> None:
    line = f"exec {sys.executable} -m sparse_run {command} -m '{stories_packed}' {arguments} <&-"
    done = subprocess.run(["bash", "-c", line], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_a_time_left_is_said_once_something_is_known_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_run.cli import common

    now = 100.0
    monkeypatch.setattr(common.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with common.Work(stream=stream) as work:
        work("loading", 0, 4)
        now += 30
        work("decode", 1, 4)
    assert stream.getvalue() == "loading\ndecode; about 1:30 left\n"
    with common.Work(quiet=True, stream=stream) as work:
        work("nothing", 1, 4)
    assert "nothing" not in stream.getvalue()


def test_bench_says_what_it_does_on_stderr_alone(run_cli: Run, stories_packed: Path) -> None:
    words = ("bench", "-m", stories_packed, "--prompt", "4", "--gen", "2", "--reps", "1", "--json")
    done = run_cli(*words)
    assert done.returncode == 0 and done.stderr.startswith("loading") and json.loads(done.stdout)["schema"] == 1
    assert run_cli(*words, "-q").stderr == ""


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["-ngl", "99"], "--device cuda"),
        (["-ngl"], "--device cuda"),
        (["--n-gpu-layers", "99"], "--device cuda"),
        (["-cnv"], "sparse-run chat"),
        (["-no-cnv"], "sparse-run generate"),
        (["-fa", "on"], "leave it out"),
        (["-ctk", "q8_0"], "16-bit"),
        (["-tb", "2"], "-t N"),
        (["-hf", "org/repo"], "sparse-run pull"),
        (["--max-kv-size", "512"], "-c N"),
        (["-st"], "generate --chat"),
        (["--json-schema", "{}"], "grammar"),
    ],
)
def test_options_of_other_engines_are_refused_with_what_to_type_here(
    words: list[str], remedy: str, run_cli: Run, tmp_path: Path
) -> None:
    """Without being told, click takes -ngl 99 for -n with the value gl, and -hf for a wish for help."""
    for command in ("generate", "chat"):
        done = run_cli(command, "-m", tmp_path / "none.gguf", "-p", "x", *words)
        assert done.returncode == 2 and done.stdout == ""
        assert f"{words[0]}" in done.stderr and remedy in done.stderr and "no option here" in done.stderr


def test_a_value_that_looks_like_another_engine_s_option_stays_a_value(run_cli: Run, stories_packed: Path) -> None:
    done = run_cli("generate", "-m", stories_packed, "-p", "-ngl", "-n", "1", "--stop", "-fa", "--temp", "0")
    assert done.returncode == 0, done.stderr
    assert "-ngl" not in run_cli("generate", "--help").stdout


def test_a_second_word_without_an_option_is_told_apart_from_the_model(run_cli: Run, stories_packed: Path) -> None:
    done = run_cli("run", stories_packed, "Hello")
    assert done.returncode == 2 and "'Hello'" in done.stderr and "with -p" in done.stderr
    done = run_cli("bench", stories_packed, "Hello")
    assert done.returncode == 2 and "'Hello'" in done.stderr and "-p" not in done.stderr.split("Error:")[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [("serve", "no server yet"), ("show", "sparse-run info"), ("genrate", "'generate'"), ("xyz", "sparse-run --help")],
)
def test_an_unknown_command_says_what_there_is_instead(name: str, words: str, run_cli: Run) -> None:
    done = run_cli(name, "-m", "x")
    assert done.returncode == 2 and done.stdout == "" and words in done.stderr
