#!/usr/bin/env python3
"""Instructions per product of the NEON kernels, from an emulator that logs every instruction executed.

    count_arm.py BUILD      BUILD: a CMake build with tests/cpp/aarch64.cmake; needs aarch64-linux-gnu-g++ and qemu-aarch64

Only instructions inside the kernels' own functions count, and the difference of two matrices, one with twice the columns.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("neon", "neon_dotprod", "neon_i8mm")
# Case: (columns of the narrower matrix, products of a column), as in kernel_count.cc.
CASES = {
    **{name: (64, 512.0) for name in ("q4", "q4_min", "q5", "q6_group16", "q8")},
    **{f"q4_{share}%": (64, 512 * active / 32) for share, active in ((50, 16), (25, 8), (9, 3))},
    "q8_25%": (64, 512 * 8 / 32),
    **{name: (512, 32.0) for name in ("q4_rows", "q6_rows", "q8_rows")},
    **{name: (64, 128 * 24.0) for name in ("q4_x24", "q8_x24")},
    "q4_rows_x24": (512, 32 * 24.0),
}
KERNEL = re.compile(rb"_ZZ?NK?2sr(4simd|4neon|12neon_dotprod|9neon_i8mm)")


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernel_count"
        subprocess.run(
            ["aarch64-linux-gnu-g++", "-std=c++17", "-O2", "-static", f"-I{ROOT}/cpp", f"-I{ROOT}/cpp/include",
             f"{ROOT}/tests/bench/kernel_count.cc", f"{sys.argv[1]}/libsr_core.a", "-lpthread", "-o", str(program)],
            check=True,
        )  # fmt: skip

        def count(isa: str, case: str, columns: int) -> int:
            log = Path(folder) / "log"
            command = ["qemu-aarch64", "-cpu", "max", "-singlestep", "-d", "exec,nochain", "-D", str(log), str(program)]
            subprocess.run([*command, isa, case, str(columns)], check=True)
            with log.open("rb") as lines:
                found = sum(1 for line in lines if KERNEL.search(line))
            log.unlink()
            return found

        print(f"{'per product':<14}" + "".join(f"{isa:>14}" for isa in VARIANTS))
        for case, (columns, products) in CASES.items():
            row = [(count(isa, case, 2 * columns) - count(isa, case, columns)) / columns / products for isa in VARIANTS]
            print(f"{case:<14}" + "".join(f"{value:>14.3f}" for value in row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
