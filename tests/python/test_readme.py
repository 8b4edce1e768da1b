"""The READMEs say only what is true of the code: commands and options exist, links lead somewhere, Python runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[2]


def readmes() -> list[Path]:
    found = [p for p in ROOT.rglob("*.md") if not {"build", ".git", ".venv"} & set(p.relative_to(ROOT).parts)]
    return sorted(
        p for p in found if "site-packages" not in p.parts and not p.is_relative_to(ROOT / "python" / "sparse_run")
    )


def commands() -> list[str]:
    """Every command line of sparse-run in a fenced block of a README."""
    out = []
    for path in readmes():
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.splitlines():
                out += [m.group(0).strip() for m in re.finditer(r"sparse-run [a-z][^#|&]*", line)]
    return sorted(set(out))


@pytest.mark.parametrize("line", commands())
def test_command_of_a_readme_exists_with_its_options(line: str) -> None:
    from sparse_run.cli import cli

    _, name, *words = shlex.split(line)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"no command {name}"
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    known = {option for p in shown for option in (*p.opts, *p.secondary_opts)}
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-?\d+|-", word):
            assert word.split("=")[0] in known, f"{name} has no {word}"


def test_readmes_have_commands() -> None:
    assert len(commands()) > 8


@pytest.mark.parametrize("path", readmes(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_ci_runs_the_readme_test_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert blocks[0].strip() == "pip install . && sparse-run chat"
    assert blocks[1].strip() in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_folder_has_its_page() -> None:
    for folder in ("cpp", "cpp/kernels", "python", "models", "predictors", "tests", "tests/bench"):
        text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        assert 200 < len(text) < 12000, folder


@pytest.mark.parametrize("path", readmes(), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_of_a_readme_compiles(path: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        compile(block, str(path), "exec")


def test_python_of_the_first_page_runs(stories_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example itself, on the tiny story model."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "model.gguf").write_bytes(stories_gguf.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102


def test_nothing_names_a_machine(project_root: Path) -> None:
    """No committed file holds a path of somebody's machine."""
    done = subprocess.run(
        ["git", "-C", project_root, "grep", "-lE", "/(work|root)/", "--", ":!LICENSE"],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode > 1:
        pytest.skip("not a git checkout")
    assert not done.stdout, done.stdout
