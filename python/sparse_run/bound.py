"""What lives in one process only, such as mapped weights and running threads, and says so where it is to be copied."""

from __future__ import annotations

from typing import NoReturn


class Bound:
    """Refuses to be pickled or copied, which `multiprocessing` does with its arguments, and tells what to do."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be copied or sent to another process: it holds mapped weights and "
            "threads; load the model where it is used, with sparse_run.load(path)"
        )
