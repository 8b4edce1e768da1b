"""Real vocabularies as GGUF files, fetched once: llama.cpp's own test files, which the source package of llama-cpp-python
carries. Only vocabularies and vectors are kept, and each vocabulary is checked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-python==0.3.16"

# Of ggml-vocab-NAME.gguf.
SHA256 = {
    "command-r": "a2f8cfea952ef7c391a6d92a1c309d0bd32e36384d9b9230569a7425732f27d9",
    "deepseek-coder": "91cb1379f2e33af1c4866b194622b7a0e12e8f0c9dba7ba2f10d55978730bec1",
    "deepseek-llm": "867f77537b54565f0d81d508c04edc41aa1d4ffc1a92745f225b4c1b02755f76",
    "falcon": "9f0bf8b0733680398b72e652e90f260f43782f326e75545fc0e49611a5ba35ad",
    "llama-bpe": "97272e430d53bc7688f52d5e0ad8ea8f163ede9f1bbd1694feaa504797d5d96e",
    "mpt": "59dc382612866d1fc6c11ea531318d327598f3412d9c8f8600607cdf3030898f",
    "phi-3": "967d7190d11c4842eab697079d98d56c2116e10eb617be355a2733bfc132e326",
    "qwen2": "44c2f46b715f585c6ab513970e8a006bfa5badd6108560054921cf598d154d8c",
    "refact": "ac3ceda902fed91ccf74312b305d9b86c37e4f8e35fa9cc6ef3ce34fca7d4678",
    "starcoder": "fedb892b4e1bd3c1f2fcdae356440b14fb458f4264d586e5c987ed93df4e174d",
}


def file_name(name: str) -> str:
    return f"ggml-vocab-{name}.gguf"


def fetch_vocabularies(folder: Path) -> Path:
    """The folder with all files of SHA256 and their `.inp` and `.out`, fetched (50 MB) where one is missing. Raises OSError
    or subprocess errors where that is impossible, ValueError for another content than expected."""
    if all(_sound(folder, name) for name in SHA256):
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        # The source of this one package: what pip needs to read its metadata still comes built.
        options = ["-q", "--no-deps", "--no-binary", PACKAGE.split("==")[0], "-d", temporary]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, PACKAGE],
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
        )
        (package,) = Path(temporary).glob("*.tar.gz")
        _take(package, folder)
    wrong = [name for name in SHA256 if not _sound(folder, name)]
    if wrong:
        raise ValueError(f"{PACKAGE} holds other vocabularies than expected: {', '.join(wrong)}")
    return folder


def _take(package: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {file_name(name) + end for name in SHA256 for end in ("", ".inp", ".out")}
    with tarfile.open(package) as archive:
        for member in archive:
            name = Path(member.name).name
            source = archive.extractfile(member) if name in wanted and member.isfile() else None
            if source is not None:
                part = folder / f".{name}.part"
                part.write_bytes(source.read())
                part.replace(folder / name)


def _sound(folder: Path, name: str) -> bool:
    path = folder / file_name(name)
    texts = all(path.with_name(path.name + end).is_file() for end in (".inp", ".out"))
    return texts and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256[name]
