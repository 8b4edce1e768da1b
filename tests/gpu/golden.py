"""The tiny model's golden stories by a program that runs on the GPU.

`golden.py pack STORIES_DIR MODEL_DIR` converts stories260K; `golden.py tell GENERATE_STORY MODEL_DIR` compares.
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

    gguf = stories_to_gguf(stories, model.with_suffix(".gguf"))
    subprocess.run([sys.executable, "-m", "sparse_run", "convert", str(gguf), str(model)], check=True)


def tell(program: str, model: Path, device: str = "cuda") -> int:
    """Greedy tokens of every stored story, by the program on the device; the number of stories that differ."""
    wrong = 0
    for entry in json.loads((ROOT / "tests" / "golden" / "stories260K.json").read_text(encoding="utf-8")):
        command = [program, str(model), str(len(entry["tokens"])), "1", *map(str, entry["prompt_tokens"])]
        environment = {**os.environ, "SPARSE_RUN_STORY_DEVICE": device}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        ids = [int(word) for word in done.stdout.split()]
        same = sum(a == b for a, b in zip(ids, entry["tokens"], strict=False))
        print(f"{entry['prompt']!r}: {same} of {len(entry['tokens'])} tokens; {done.stderr.strip()}")
        wrong += ids != entry["tokens"]
    return wrong


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "pack":
        pack(Path(sys.argv[2]), Path(sys.argv[3]))
    elif len(sys.argv) == 4 and sys.argv[1] == "tell":
        sys.exit(1 if tell(sys.argv[2], Path(sys.argv[3])) else 0)
    else:
        sys.exit(__doc__)
