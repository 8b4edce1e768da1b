"""Multiple-choice tasks: the answer whose text is likeliest after the question, per byte, as the usual harnesses score it.

Files: JSON lines {"query", "choices", "gold"}, or {"context_options", "continuation", "gold"} (winogrande: the same ending
after each context), .bz2 or not; hellaswag also as text, six lines a question: context, gold, four endings.
"""

from __future__ import annotations

import bz2
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Error, UsageError

if TYPE_CHECKING:
    from .. import _core
    from ..skipping import Skipping
    from ..tokenizer import Tokenizer

# What stands between question and answer.
DELIMITERS = {
    "piqa": "\nAnswer: ",
    "arc_easy": "\nAnswer: ",
    "winogrande": " ",
    "hellaswag": " ",
    "openbook_qa": " ",
    "boolq": "\nAnswer: ",
}
TASKS = tuple(DELIMITERS)
_JSON_FORM = (
    'a line of JSON with "query", two or more "choices" and "gold", the number of the right one from 0 on, or with '
    '"context_options", "continuation" and "gold"'
)
_TEXT_FORM = "a line of JSON that begins with {, or six lines: context, number of the right ending from 0 on, four endings"


@dataclass(frozen=True)
class Question:
    """`contexts[i]` followed by `endings[i]` is answer i; `gold` is the right one."""

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class ChoiceResult:
    """`accuracy` by log-likelihood per byte of the answer, `accuracy_raw` by log-likelihood; `stderr` is of `accuracy`."""

    task: str
    accuracy: float
    accuracy_raw: float
    stderr: float
    questions: int
    choices: list[int]
    """The answer chosen for each question."""
    density: dict[str, float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_questions(path: str | Path, task: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions of a file. Raises UsageError where a line is none or there are none."""
    path = Path(path)
    data = path.read_bytes()
    try:
        text = (bz2.decompress(data) if data[:3] == b"BZh" else data).decode("utf-8-sig")
    except (OSError, ValueError):
        raise UsageError(f"{path}: neither UTF-8 text nor a whole bzip2 file; give the task's file") from None
    lines = [line for line in text.splitlines() if line.strip()]
    as_json = bool(lines) and lines[0].startswith("{")
    reader = _json_lines(lines, DELIMITERS[task]) if as_json else _six_lines(lines)
    out: list[Question] = []
    try:
        for question in itertools.islice(reader, limit):
            if len(question.contexts) < 2 or not 0 <= question.gold < len(question.contexts):
                raise UsageError(
                    f"{path}: question {len(out) + 1} is not one of {task}: too few answers, or the right one is not "
                    "among them"
                )
            out.append(question)
    except (ValueError, KeyError, TypeError, AttributeError):
        wanted = _JSON_FORM if as_json else _TEXT_FORM
        raise UsageError(f"{path}: question {len(out) + 1} is not one of {task}, which is {wanted}") from None
    if not out:
        raise UsageError(f"{path}: no questions; give the task's file")
    return out


def _json_lines(lines: list[str], delimiter: str) -> Iterator[Question]:
    for line in lines:
        r = json.loads(line)
        if "context_options" in r:
            contexts = tuple(str(c).rstrip() for c in r["context_options"])
            yield Question(contexts, (" " + r["continuation"].strip(),) * len(contexts), int(r["gold"]))
        else:
            endings = tuple(delimiter + str(c).strip() for c in r["choices"])
            yield Question((str(r["query"]).rstrip(),) * len(endings), endings, int(r["gold"]))


def _six_lines(lines: list[str]) -> Iterator[Question]:
    for i in range(0, len(lines), 6):
        context, gold, *endings = lines[i : i + 6]
        yield Question((context.rstrip(),) * len(endings), tuple(" " + e.strip() for e in endings), int(gold))


def score(
    model: _core.Model,
    tokenizer: Tokenizer,
    questions: list[Question],
    *,
    task: str,
    n_ctx: int,
    plan: _core.Sparsity | Skipping | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ChoiceResult:
    """Answers questions; with a plan every position past its dense tokens is masked as decoding would mask it, or, where it is
    chosen from a prompt, every position of an answer: the question is then the prompt.

    n_ctx: the longest question with an answer, in tokens; of longer ones the beginning is cut off."""
    import numpy as np

    from .. import _core
    from ..skipping import Attached
    from .perplexity import token_nlls

    session = _core.Session(model, n_ctx)
    attached = Attached(session, plan, blocks=True)
    session.density()
    chosen: list[int] = []
    right = right_raw = 0
    start = time.perf_counter()
    for number, question in enumerate(questions):
        if progress is not None:
            progress(task, number, len(questions))
        if attached.by_prompt:
            session.truncate(0)  # what another question did says nothing about this one
        sums, bytes_of = [], []
        for context, ending in zip(question.contexts, question.endings, strict=True):
            head = tokenizer.encode(context, parse_special=False)
            whole = tokenizer.encode(context + ending, parse_special=False)
            # Tokens may join across the seam; what counts as the ending begins after the context's tokens.
            begin = min(len(head), len(whole) - 1)
            cut = max(0, len(whole) - n_ctx)
            whole, begin = whole[cut:], max(1, begin - cut)
            cached = session.tokens
            same = next((i for i, (a, b) in enumerate(zip(cached, whole, strict=False)) if a != b), len(cached))
            session.truncate(min(same, begin - 1, len(whole) - 1))
            ids = np.asarray(whole, dtype=np.int32)
            if session.n_past < begin - 1:
                known = session.n_past
                attached.before(known)
                session.eval(ids[known : begin - 1])
                attached.after()
            total = -float(token_nlls(attached.logits(ids[begin - 1 : -1]), ids[begin:]).sum())
            if not math.isfinite(total):
                raise Error(f"question {number + 1}: the logits are not finite numbers; convert the model again")
            sums.append(total)
            bytes_of.append(len(ending.strip().removeprefix("Answer: ").encode()))
        per_byte = [s / max(1, n) for s, n in zip(sums, bytes_of, strict=True)]
        chosen.append(int(np.argmax(per_byte)))
        right += chosen[-1] == question.gold
        right_raw += int(np.argmax(sums)) == question.gold
    if progress is not None:
        progress(task, len(questions), len(questions))
    n = len(questions)
    share = right / n
    return ChoiceResult(
        task=task,
        accuracy=share,
        accuracy_raw=right_raw / n,
        stderr=math.sqrt(share * (1 - share) / n),
        questions=n,
        choices=chosen,
        density=session.density(),
        seconds=time.perf_counter() - start,
    )
