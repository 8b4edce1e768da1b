"""Multiple choice on a real model: each answer's likelihood is that of the whole text, computed in one piece."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sparse_run import _core
from sparse_run.errors import UsageError
from sparse_run.eval.choice import read_questions, score
from sparse_run.eval.perplexity import log_softmax
from sparse_run.packed_header import SITES, read_header
from sparse_run.tokenizer import Tokenizer

RunCli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_scores_are_those_of_whole_texts(smollm2_packed: Path, shared_dir: Path) -> None:
    header, tokenizer = read_header(smollm2_packed), Tokenizer.load(smollm2_packed)
    model = _core.Model(str(smollm2_packed), 2)
    plan = _core.Sparsity(
        model, {site: [np.full(1, 0.05, np.float32)] * header.n_layers for site in SITES}, dense_tokens=4
    )
    for task in ("arc_easy", "winogrande"):
        questions = read_questions(shared_dir / "data" / "choice" / f"{task}.jsonl", task, 3)
        for used in (None, plan):
            result = score(model, tokenizer, questions, task=task, n_ctx=512, plan=used)
            expected = []
            for q in questions:
                per_byte = []
                for context, ending in zip(q.contexts, q.endings, strict=True):
                    session = _core.Session(model, 512)
                    session.set_sparsity(used, mask_prefill=True)
                    ids = tokenizer.encode(context + ending, parse_special=False)
                    begin = len(tokenizer.encode(context, parse_special=False))
                    logits = session.eval_all(np.asarray(ids, np.int32))
                    total = sum(float(log_softmax(logits)[i - 1, ids[i]]) for i in range(begin, len(ids)))
                    per_byte.append(total / len(ending.strip().removeprefix("Answer: ").encode()))
                expected.append(int(np.argmax(per_byte)))
            assert result.choices == expected
            assert result.accuracy == np.mean([c == q.gold for c, q in zip(expected, questions, strict=True)])
    model.close()


def test_task_on_the_command_line(smollm2_packed: Path, shared_dir: Path, run_cli: RunCli) -> None:
    data = shared_dir / "data" / "choice" / "arc_easy.jsonl"
    done = run_cli("eval", "-m", smollm2_packed, "--task", "arc_easy", "--data", data, "--limit", 60, "--json")
    assert done.returncode == 0, done.stderr
    r = json.loads(done.stdout)
    assert r["task"] == "arc_easy" and r["questions"] == len(r["choices"]) == 60
    assert r["accuracy"] >= 0.4, "guessing gives 0.25"
    for words in (("--task", "piqa"), (), ("--task", "piqa", "--text", data, "--data", data)):
        assert run_cli("eval", "-m", smollm2_packed, *words).returncode == 2


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"query": "What?", "choices": ["a", "b"]}',
        '{"query": "What?", "choices": ["a", "b"], "gold": "first"}',
        '{"query": "What?", "choices": 3, "gold": 0}',
        '{"context_options": ["a", "b"], "continuation": 3, "gold": 0}',
        "[1, 2]",
        "context only",
    ],
)
def test_what_is_no_question_is_said_in_words_of_the_format(text: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(UsageError) as refused:
        read_questions(path, "piqa")
    said = str(refused.value)
    assert said.startswith(f"{path}: question 1 is not one of piqa, which is ") and "JSON" in said, said
    for words in ("Expecting", "unpack", "invalid literal", "object", "NoneType"):
        assert words not in said


@pytest.mark.parametrize(("choices", "gold"), [(["a"], 0), (["a", "b"], 2), (["a", "b"], -1)])
def test_a_question_whose_answers_do_not_do_is_refused(choices: list[str], gold: int, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = {"query": "What?", "choices": ["a", "b"], "gold": 1}
    path.write_text("\n".join(json.dumps(q) for q in (good, good | {"choices": choices, "gold": gold})))
    with pytest.raises(UsageError, match=r"question 2 .* too few answers, or the right one is not among them"):
        read_questions(path, "piqa")


def test_a_task_s_file_that_is_no_text_or_empty_is_named(tmp_path: Path) -> None:
    for data, words in ((b"BZh9 cut", "bzip2"), (b"\xff\xfe", "UTF-8"), (b"\n\n", "no questions")):
        (tmp_path / "data").write_bytes(data)
        with pytest.raises(UsageError, match=words):
            read_questions(tmp_path / "data", "piqa")
