"""A directory made completely under a temporary name beside its destination, then renamed: there or not there, never half.

A temporary directory is held under a lock for as long as its maker lives; one that nobody holds is left from a process
that was killed, and is removed by whoever next works beside it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Error

if TYPE_CHECKING:
    from typing_extensions import Self

_MARK = ".part-"
_GRACE_SECONDS = 60.0  # between a directory's creation and its lock, generously


class StagedDirectory:
    """`with StagedDirectory(dst) as staged: ... staged.commit()`; without commit, nothing remains.

    `path` is the temporary directory. Raises Error where the destination's folder cannot be written.
    """

    def __init__(self, dst: Path) -> None:
        self.dst = dst
        try:
            dst.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(dst.parent)
            self.path = Path(tempfile.mkdtemp(prefix=f".{dst.name}{_MARK}", dir=dst.parent))
        except OSError as error:
            raise write_error(dst.parent, error) from None
        self._lock = _lock(self.path, wait=True)
        self._committed = False

    def commit(self, *, replace: bool = False) -> bool:
        """Renames to the destination. Where something is there already it is replaced, or else (False) kept and this
        directory dropped."""
        self.path.chmod(0o755)
        aside: list[Path] = []
        try:
            while True:
                try:
                    os.rename(self.path, self.dst)
                    self._committed = True
                    return True
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                if not replace:
                    return False
                # What another process puts there meanwhile is moved away in the next round.
                aside.append(Path(tempfile.mkdtemp(prefix=f".{self.dst.name}{_MARK}", dir=self.dst.parent)))
                with contextlib.suppress(FileNotFoundError):
                    os.rename(self.dst, aside[-1] / "old")
        except OSError as error:
            raise write_error(self.dst, error) from None
        finally:
            for old in aside:
                shutil.rmtree(old, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def write_error(where: Path, error: OSError) -> Error:
    """The one-line error for a folder that cannot be written or a disk that is full."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Error(
            f"{where}: {reason}; nothing was kept; free some space, or choose another disk with XDG_CACHE_HOME "
            "(conversions) or XDG_DATA_HOME (downloads)"
        )
    return Error(
        f"{where}: cannot be written ({reason}); check its permissions, or choose another folder with XDG_CACHE_HOME "
        "(conversions) or XDG_DATA_HOME (downloads)"
    )


def remove_stale(parent: Path) -> None:
    """Removes what killed processes left in `parent`; never raises."""
    with contextlib.suppress(OSError):
        for entry in parent.glob(f".*{_MARK}*"):
            with contextlib.suppress(OSError):
                age = time.time() - entry.lstat().st_ctime
                if not entry.is_dir() or entry.is_symlink():
                    continue
                lock = _lock(entry, wait=False)
                if lock is None:
                    continue
                try:
                    if age > _GRACE_SECONDS or _was_locked(entry):
                        shutil.rmtree(entry, ignore_errors=True)
                finally:
                    os.close(lock)


def _was_locked(path: Path) -> bool:
    """A directory with something in it had its lock when that was put there."""
    return any(path.iterdir())


def _lock(path: Path, *, wait: bool) -> int | None:
    """An exclusive lock on a directory, released when its maker closes it or dies; None where another holds it, or
    where the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd
