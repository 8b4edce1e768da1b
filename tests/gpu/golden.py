"""The tiny model's golden stories by a program that runs on the GPU.

`golden.py pack STORIES_DIR MODEL_DIR` converts stories260K (Python with sparse_run's needs; 2 MB at most); `golden.py tell GENERATE_STORY
MODEL_DIR [TOKENS]` compares, whole or TOKENS of each story (Python alone). Exit status 1: some tokens differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pack(stories: Path, model: Path) -> None:
    """stories260K as llama2.c has it, into a packed directory."""
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "python")]
    from llama2c import stories_to_gguf

    model.parent.mkdir(parents=True, exist_ok=True)
    gguf = stories_to_gguf(stories, model.with_suffix(".gguf"))
    path = os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "sparse_run", "convert", str(gguf), str(model)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
    gguf.unlink()
    size = sum(file.stat().st_size for file in model.iterdir())
    print(f"{model}: {size / 1e6:.1f} MB", flush=True)


def tell(program: str, model: Path, tokens: int | None = None, device: str = "cuda") -> int:
    """Greedy tokens of every stored story, by the program on the device; the number of stories that differ."""
    wrong = 0
    for entry in json.loads((ROOT / "tests" / "golden" / "stories260K.json").read_text(encoding="utf-8")):
        wanted = entry["tokens"][:tokens]
        command = [program, str(model), str(len(wanted)), "1", *map(str, entry["prompt_tokens"])]
        environment = {**os.environ, "SPARSE_RUN_STORY_DEVICE": device}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        ids = [int(word) for word in done.stdout.split()]
        same = sum(a == b for a, b in zip(ids, wanted, strict=False))
        print(f"{entry['prompt']!r}: {same} of {len(wanted)} tokens; {done.stderr.strip()}", flush=True)
        wrong += ids != wanted or done.returncode != 0
    return wrong


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if len(arguments) == 3 and arguments[0] == "pack":
        pack(Path(arguments[1]), Path(arguments[2]))
    elif len(arguments) in (3, 4) and arguments[0] == "tell":
        wanted_tokens = int(arguments[3]) if len(arguments) == 4 else None
        sys.exit(1 if tell(arguments[1], Path(arguments[2]), wanted_tokens) else 0)
    else:
        sys.exit(__doc__)
