"""The test harness itself: a run that is told to end leaves nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SLOW = """
import time
from pathlib import Path

HERE = Path(__file__).parent

def ahead(work, items):  # as a build that other tests wait for
    work.submit(lambda: work.run(["sh", "-c", f"echo $$ > {HERE}/pid; sleep 300; :"]))

def test_slow(tmp_path):
    try:
        while not (HERE / "pid").is_file():
            time.sleep(0.05)
        (HERE / "begun").touch()
        time.sleep(300)
    finally:
        (HERE / "undone").touch()
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_sigterm_ends_a_run_with_its_fixtures_and_its_builds(tmp_path: Path, project_root: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW)
    alone = ["-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull]
    words = [sys.executable, "-m", "pytest", *alone, str(tmp_path)]
    path = os.pathsep.join([str(project_root / "tests"), *sys.path])
    run = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "begun").exists():
            assert run.poll() is None and time.monotonic() < until, run.communicate(timeout=10)[0]
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        assert alive(pid)
        run.send_signal(signal.SIGTERM)
        out = run.communicate(timeout=60)[0]
        assert run.returncode == 128 + signal.SIGTERM and "terminated" in out
        assert (tmp_path / "undone").exists() and not alive(pid)
    finally:
        run.kill()
