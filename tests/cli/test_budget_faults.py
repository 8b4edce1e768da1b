"""--memory-budget on file systems and disks that misbehave: without direct reads, unmounted, gone, not ours to read. What fails
says so in one line with the documented exit code; what can go on gives the same answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

Need = Callable[[str], NoReturn]
PROMPT = ("-p", "Once upon a time", "-n", "8", "--temp", "0", "-t", "2", "-c", "256")


def generate(packed: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sparse_run", "generate", "-m", str(packed), *PROMPT, *more]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def done_by(*command: str) -> bool:
    """Whether a command of the system's administrator worked."""
    try:
        return run(list(command)).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def answer(smollm2_packed: Path) -> str:
    done = run(generate(smollm2_packed))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def budget(smollm2_packed: Path) -> str:
    """One under which about half of the weights are read for every token."""
    done = run(generate(smollm2_packed, "--memory-budget", "1M"))
    assert done.returncode == 5, done.stderr
    floor = int(done.stderr.split("--memory-budget ")[1].split("M")[0])
    return f"{floor + 10}M"


@pytest.fixture()
def without_direct_reads(smollm2_packed: Path, tmp_path: Path, need: Need) -> Iterator[Path]:
    at = tmp_path / "ram"
    at.mkdir()
    if os.geteuid() != 0 or not done_by("mount", "-t", "ramfs", "none", str(at)):
        need("a file system without direct reads cannot be mounted here")
    try:
        yield Path(shutil.copytree(smollm2_packed, at / "packed"))
    finally:
        done_by("umount", "-l", str(at))


@pytest.fixture()
def disk(smollm2_packed: Path, tmp_path: Path, need: Need) -> Iterator[tuple[Path, Path]]:
    """(mount point of a disk that holds the model, the file that the disk is)."""
    image, at = tmp_path / "image", tmp_path / "disk"
    at.mkdir()
    size = sum(path.stat().st_size for path in smollm2_packed.iterdir() if path.is_file())
    with image.open("wb") as file:
        file.truncate(int(size * 1.2) + (16 << 20))
    if os.geteuid() != 0 or not done_by("mkfs.ext4", "-q", "-F", str(image)):
        need("no file system can be made here")
    if not done_by("mount", "-o", "loop", str(image), str(at)):
        need("no disk can be mounted here")
    try:
        shutil.copytree(smollm2_packed, at / "packed")
        yield at, image
    finally:
        done_by("umount", "-l", str(at))


def started(packed: Path, budget: str) -> subprocess.Popen[str]:
    """A long generation of which the first words have come."""
    command = [*generate(packed, "--memory-budget", budget, "--ignore-eos"), "-n", "80"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(10)
    return process


def test_a_file_system_without_direct_reads_is_read_through_its_cache(
    without_direct_reads: Path, answer: str, budget: str
) -> None:
    done = run(generate(without_direct_reads, "--memory-budget", budget))
    assert done.returncode == 0, done.stderr
    assert done.stdout == answer
    assert "this file system has no direct reads" in done.stderr
    found = json.loads(run(generate(without_direct_reads, "--memory-budget", budget, "--json")).stdout)["memory"]
    assert found["direct"] is False
    assert found["streamed_bytes"] > 0 < found["read_bytes"]


def test_unmounting_does_not_end_a_generation(disk: tuple[Path, Path], budget: str) -> None:
    at, _ = disk
    process = started(at / "packed", budget)
    assert done_by("umount", "-l", str(at))
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    done = run(generate(at / "packed", "--memory-budget", budget))
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("\n") == 1 and str(at / "packed") in done.stderr


def test_a_disk_that_goes_away_ends_the_generation_in_one_line(
    disk: tuple[Path, Path], budget: str, smollm2_packed: Path, answer: str
) -> None:
    at, image = disk
    process = started(at / "packed", budget)
    os.truncate(image, 0)  # every read of the disk fails from now on
    start = time.monotonic()
    _, told = process.communicate(timeout=300)
    assert process.returncode == 1, told
    assert time.monotonic() - start < 60
    errors = [line for line in told.splitlines() if "error:" in line]
    assert len(errors) == 1 and "Traceback" not in told
    assert "cannot read" in errors[0] and "weights.safetensors" in errors[0]
    assert "what was generated before it is sound" in errors[0]

    again = run(generate(at / "packed", "--memory-budget", budget))
    assert again.returncode in (1, 4), again.stderr
    assert "Traceback" not in again.stderr and "weights.safetensors" in again.stderr
    other = run(generate(smollm2_packed, "--memory-budget", budget))
    assert other.stdout == answer


def test_a_file_that_may_not_be_read_is_named(stories_packed: Path, tmp_path: Path, need: Need) -> None:
    packed = Path(shutil.copytree(stories_packed, tmp_path / "packed"))
    command = generate(packed, "--memory-budget", "200M")
    if os.geteuid() == 0:  # the superuser may read everything, unless he gives that up
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
        if not done_by(*command[:3], "true"):
            need("the superuser's rights cannot be given up here")
    allowed = run(command)
    assert allowed.returncode == 0, allowed.stderr
    (packed / "weights.safetensors").chmod(0)
    refused = run(command)
    assert refused.returncode == 4, refused.stderr
    errors = [line for line in refused.stderr.splitlines() if not line.startswith("loading")]
    assert len(errors) == 1 and "weights.safetensors" in errors[0] and "Permission denied" in errors[0]
    assert not refused.stdout
