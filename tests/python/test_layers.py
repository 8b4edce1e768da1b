"""The shape of the source tree: who may include whom, how long a file may be, what each instruction set's folder holds.

bindings -> engine -> cuda -> model -> {sparse, flash} -> {kernels, format} -> base; cpp/include is open to all.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPP = ROOT / "cpp"

# A folder may include itself and every folder with a smaller number; those with the same number do not see each other.
LEVEL = {
    "include": 0,
    "base": 1,
    "kernels": 2,
    "format": 2,
    "sparse": 3,
    "flash": 3,
    "model": 4,
    "cuda": 5,
    "engine": 6,
    "bindings": 7,
}
ISA_FOLDERS = ("generic", "avx2", "avx512", "neon")
MAX_LINES = 600
MAX_COLUMNS = 120

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
CODE = {".cc", ".cu", ".h", ".inc", ".py", ".pyi", ".sh"}


def sources(*suffixes: str) -> list[Path]:
    folders = [CPP, ROOT / "predictors", ROOT / "python", ROOT / "models", ROOT / "tests"]
    found = [p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes and p.is_file()]
    return sorted(p for p in found if "__pycache__" not in p.parts)


def resolve(source: Path, name: str) -> Path | None:
    """The project's file that an include names, as the compiler finds it."""
    for base in (source.parent, CPP, CPP / "include"):
        path = (base / name).resolve()
        if path.is_file():
            return path
    return None


def folder_of(path: Path) -> str:
    return path.relative_to(CPP).parts[0]


def isa_of(path: Path) -> str | None:
    """The instruction set whose folder of kernels holds the file."""
    return next((name for name in ISA_FOLDERS if path.is_relative_to(CPP / "kernels" / name)), None)


def violations(source: Path, text: str) -> list[str]:
    """What is wrong with the includes of one file of cpp/ or predictors/."""
    out = []
    for name in INCLUDE.findall(text):
        target = resolve(source, name)
        where = f"{source.relative_to(ROOT)} includes {name}"
        if target is None:
            out.append(f"{where}, which does not exist")
        elif source.is_relative_to(ROOT / "predictors"):
            allowed = target.is_relative_to(CPP / "include") or target == CPP / "kernels" / "table.h"
            own = target.is_relative_to(source.parent) or target.is_relative_to(ROOT / "predictors" / "common")
            if not (allowed or own):
                out.append(f"{where}: a predictor sees only cpp/include and the kernel table")
        elif not target.is_relative_to(CPP):
            out.append(f"{where}, which is outside cpp/")
        else:
            mine, theirs = folder_of(source), folder_of(target)
            if mine != theirs and LEVEL[theirs] >= LEVEL[mine]:
                out.append(f"{where}: {mine} may not know {theirs}")
            if (isa := isa_of(target)) and isa_of(source) != isa and source.parent != CPP / "kernels":
                out.append(f"{where}: others see {isa} through the kernel table only")
    return out


def test_includes_go_one_way() -> None:
    checked, wrong = 0, []
    for source in sources(".cc", ".cu", ".h", ".inc"):
        if source.is_relative_to(CPP) or source.is_relative_to(ROOT / "predictors"):
            assert source.is_relative_to(ROOT / "predictors") or folder_of(source) in LEVEL, f"{source}: a new layer?"
            checked += 1
            wrong += violations(source, source.read_text(encoding="utf-8"))
    assert checked > 20
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "include"),
    [
        ("base/log.cc", "engine/engine.h"),
        ("kernels/dispatch.cc", "model/graph.h"),
        ("kernels/avx2/gemv.cc", "kernels/avx512/gemv.h"),
        ("model/graph.cc", "kernels/avx2/gemv.h"),
        ("../predictors/teal/select.cc", "base/cpu_info.h"),
        ("sparse/mask.cc", "model/graph.h"),
        ("include/sparse_run/engine.h", "base/cpu_info.h"),
        ("engine/engine.cc", "no_such_file.h"),
    ],
)
def test_the_check_itself_finds_a_wrong_include(source: str, include: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = resolve
    monkeypatch.setitem(
        globals(),
        "resolve",
        lambda s, name: None if name == "no_such_file.h" else real(s, name) or (CPP / name).resolve(),
    )
    assert violations((CPP / source).resolve(), f'#include "{include}"\n')


def test_no_file_is_longer_than_the_limit() -> None:
    files = sources(*CODE)
    assert len(files) > 30
    long = {
        str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"longer than {MAX_LINES} lines: {long}"


def test_lines_fit_a_screen() -> None:
    """Those of C++, CUDA and shell."""
    files = sources(*CODE - {".py", ".pyi"})
    assert len(files) > 100
    long = [
        f"{p.relative_to(ROOT)}:{number}"
        for p in files
        for number, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > MAX_COLUMNS
    ]
    assert not long, f"longer than {MAX_COLUMNS} columns: {long}"


def test_every_isa_folder_holds_names_that_generic_has() -> None:
    """The generic file of a name is the readable reference of the faster ones; a name of its own would have none."""
    kernels = CPP / "kernels"
    present = [name for name in ISA_FOLDERS if (kernels / name).is_dir() and any((kernels / name).glob("*.cc"))]
    assert "generic" in present
    generic = {p.name for p in (kernels / "generic").glob("*.cc")}
    for name in present:
        extra = {p.name for p in (kernels / name).glob("*.cc")} - generic
        assert not extra, f"kernels/{name} has {sorted(extra)}, kernels/generic has not"
        assert (kernels / name / "table.cc").is_file(), f"kernels/{name} has no table.cc"


def test_nothing_but_the_command_line_imports_the_command_line() -> None:
    package = ROOT / "python" / "sparse_run"
    for path in sorted(package.rglob("*.py")):
        if path.is_relative_to(package / "cli") or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                assert "cli" not in name.split("."), f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"


def test_every_source_file_says_its_idea_first() -> None:
    """The first lines of a file are a comment or a docstring."""
    silent = []
    for path in sources(".cc", ".cu", ".h", ".py"):
        text = path.read_text(encoding="utf-8").lstrip()
        if path.name == "__init__.py" and not text:
            continue
        lines = [line for line in text.splitlines() if not line.startswith("#!")]
        if not lines or not lines[0].startswith(("//", '"""', 'r"""', "/*", "# ")):
            silent.append(str(path.relative_to(ROOT)))
    assert not silent, f"no first line that says what they are for: {silent}"
