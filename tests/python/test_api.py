"""The Python API as a program uses it: generation, stop strings, caches, cancelling, threads, errors, imports."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sparse_run as sr
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_run.generation import StopMatcher

STORY = "Once upon a time"


@pytest.fixture(scope="module")
def stories(stories_packed: Path) -> Iterator[sr.Model]:
    with sr.Model(stories_packed, threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def smollm2(smollm2_packed: Path) -> Iterator[sr.Model]:
    with sr.Model(smollm2_packed, threads=2, ctx_size=2048) as model:
        yield model


def greedy(model: sr.Model | sr.Session, prompt: Any = STORY, **options: Any) -> sr.Generation:
    return model.generate(prompt, temperature=0, **{"max_tokens": 40, **options})


class TestGeneration:
    def test_pieces_join_to_the_text_and_the_text_is_that_of_the_tokens(self, stories: sr.Model) -> None:
        generation = greedy(stories)
        pieces = list(generation)
        assert len(pieces) > 20
        assert "".join(pieces) == generation.text == stories.detokenize([1, *generation.tokens])
        assert generation.finish_reason == "length" and len(generation.tokens) == 40
        timings = generation.timings
        assert timings.prompt_tokens + timings.cached_tokens == len(generation.prompt_tokens)
        assert timings.decode_tokens == 39 and timings.decode_tokens_per_s > 0 and timings.first_token_seconds > 0
        assert set(timings.to_dict()) >= {"prompt_tokens", "decode_tokens_per_s", "first_token_seconds"}

    def test_token_ids_are_a_prompt_too(self, stories: sr.Model) -> None:
        assert greedy(stories, stories.tokenize(STORY)).read() == greedy(stories).read()

    def test_greedy_is_the_argmax_of_the_logits(self, stories: sr.Model) -> None:
        generation = greedy(stories, max_tokens=12)
        generation.read()
        ids = [*generation.prompt_tokens, *generation.tokens]
        logits = stories.logits(ids)
        assert logits.shape == (len(ids), stories.n_vocab) and logits.dtype == np.float32
        begin = len(generation.prompt_tokens) - 1
        assert logits[begin:-1].argmax(axis=1).tolist() == generation.tokens

    def test_a_seed_repeats_and_seeds_differ(self, stories: sr.Model) -> None:
        def text(seed: int) -> str:
            return stories.generate(
                STORY, seed=seed, temperature=1.5, top_k=0, top_p=1.0, min_p=0, max_tokens=30
            ).read()

        assert text(1) == text(1)
        assert len({text(seed) for seed in (1, 2, 3, -1, -1)}) >= 4

    def test_the_end_token_ends_it_unless_ignored(self, smollm2: sr.Model) -> None:
        prompt = smollm2.chat_ids([{"role": "user", "content": "Say only: yes"}])
        ended = greedy(smollm2, prompt, max_tokens=200)
        ended.read()
        assert ended.finish_reason == "stop" and not set(ended.tokens) & set(smollm2.tokenizer.eos_ids)
        longer = greedy(smollm2, prompt, max_tokens=len(ended.tokens) + 8, ignore_eos=True)
        longer.read()
        assert longer.finish_reason == "length" and longer.tokens[: len(ended.tokens)] == ended.tokens
        assert longer.tokens[len(ended.tokens)] in smollm2.tokenizer.eos_ids

    def test_zero_tokens_compute_nothing(self, stories: sr.Model) -> None:
        generation = greedy(stories, max_tokens=0)
        assert generation.read() == "" and generation.finish_reason == "length" and generation.tokens == []

    def test_repetition_penalty_sees_the_prompt(self, stories: sr.Model) -> None:
        plain = greedy(stories, STORY, max_tokens=1)
        plain.read()
        again = [*plain.prompt_tokens, *plain.tokens * 3]
        wanted = int(stories.logits(again)[-1].argmax())
        penalised = stories.generate(
            [*again, wanted], temperature=0, repeat_penalty=1e6, repeat_last_n=-1, max_tokens=1
        )
        penalised.read()
        assert penalised.tokens[0] not in [*again, wanted]

    def test_chat_applies_the_template(self, smollm2: sr.Model) -> None:
        messages = [{"role": "user", "content": "Say only: yes"}]
        generation = smollm2.chat(messages, temperature=0, max_tokens=60)
        assert "yes" in generation.read().lower() and generation.finish_reason == "stop"
        assert smollm2.detokenize(generation.prompt_tokens, skip_special=False) == smollm2.template.render(messages)

    def test_an_empty_prompt_begins_with_the_first_token_of_texts(self, stories: sr.Model) -> None:
        assert greedy(stories, "").prompt_tokens == [stories.tokenizer.bos_id]


class TestStopStrings:
    @given(
        st.text("ab", max_size=40),
        st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
        st.lists(st.integers(1, 5), max_size=40),
    )
    @settings(max_examples=500, deadline=None)
    def test_any_cutting_into_pieces_gives_the_text_up_to_the_stop_that_is_complete_first(
        self, text: str, stops: list[str], sizes: list[int]
    ) -> None:
        found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
        wanted = text[: min(found)[1]] if found else text
        matcher, shown, at = StopMatcher(stops), "", 0
        for size in [*sizes, len(text)]:
            piece = matcher.push(text[at : at + size])
            shown, at = shown + piece, at + size
            assert wanted.startswith(shown)  # nothing of a stop string leaks, ever
        assert shown + matcher.finish() == wanted and matcher.stopped == bool(found)

    def test_the_answer_ends_before_a_stop_string_that_spans_tokens(self, stories: sr.Model) -> None:
        whole = greedy(stories).read()
        stop = whole[20:32]
        generation = greedy(stories, stop=["never there", stop])
        pieces = list(generation)
        assert "".join(pieces) == generation.text == whole[: whole.index(stop)]
        assert generation.finish_reason == "stop"

    def test_one_stop_string_may_be_given_as_text(self, stories: sr.Model) -> None:
        whole = greedy(stories).read()
        assert greedy(stories, stop=whole[5:9]).read() == whole[: whole.index(whole[5:9])]

    def test_what_is_held_back_comes_at_the_end(self, stories: sr.Model) -> None:
        whole = greedy(stories).read()
        assert greedy(stories, stop=whole[-3:] + "\x01").read() == whole


class TestSession:
    def test_the_cached_prefix_is_not_computed_again(self, stories: sr.Model) -> None:
        with stories.session() as session:
            first = greedy(session)
            first.read()
            follow = [*first.prompt_tokens, *first.tokens, 300, 301]
            second = greedy(session, follow)
            second.read()
            # The last token of the first answer was sampled, never evaluated.
            assert second.timings.cached_tokens == len(follow) - 3
            assert session.tokens[: len(follow)] == follow
            with stories.session() as fresh:
                again = greedy(fresh, follow)
                again.read()
            assert again.timings.cached_tokens == 0 and again.tokens == second.tokens

    def test_another_prompt_keeps_only_what_is_common(self, stories: sr.Model) -> None:
        with stories.session() as session:
            greedy(session, [1, 300, 301, 302, 303], max_tokens=4).read()
            other = greedy(session, [1, 300, 301, 400], max_tokens=4)
            other.read()
            assert other.timings.cached_tokens == 3
            same = greedy(session, [1, 300, 301, 400], max_tokens=4)
            same.read()
            assert same.timings.cached_tokens == 3 and same.tokens == other.tokens  # the last one is always computed

    def test_the_model_keeps_a_session_between_calls(self, stories: sr.Model) -> None:
        greedy(stories, STORY + " there was a").read()
        again = greedy(stories, STORY + " there was a")
        again.read()
        assert again.timings.prompt_tokens == 1

    def test_the_context_ends_an_answer(self, stories: sr.Model) -> None:
        with stories.session(ctx_size=24) as session:
            generation = greedy(session, max_tokens=None, ignore_eos=True)
            generation.read()
            assert generation.finish_reason == "length" and generation.context_full
            assert session.n_past == 24
            assert len(generation.prompt_tokens) + len(generation.tokens) == 25

    def test_a_prompt_that_fills_the_context_still_gives_a_token(self, stories: sr.Model) -> None:
        with stories.session(ctx_size=8) as session:
            generation = greedy(session, [1, *range(300, 307)])
            generation.read()
            assert len(generation.tokens) == 1 and generation.context_full

    def test_a_prompt_longer_than_the_context_says_numbers_and_remedy(self, stories: sr.Model) -> None:
        with stories.session(ctx_size=8) as session:
            with pytest.raises(sr.ContextLengthError, match=r"9 tokens .* 8; .*ctx_size"):
                greedy(session, list(range(300, 309)))
            assert greedy(session, [1, 300], max_tokens=2).read() is not None  # and the session is as before

    def test_clear_forgets(self, stories: sr.Model) -> None:
        with stories.session() as session:
            greedy(session).read()
            stats = session.stats()
            assert stats["n_past"] == session.n_past > 40 and stats["kv_bytes"] > 0 and stats["n_ctx"] == 512
            session.clear()
            assert session.n_past == 0 and session.tokens == []

    def test_a_new_generation_ends_the_one_before(self, stories: sr.Model) -> None:
        with stories.session() as session:
            first = greedy(session)
            next(first)
            second = greedy(session, "The dog")
            text = second.read()
            assert first.finish_reason == "cancelled" and list(first) == []
        with stories.session() as fresh:
            assert greedy(fresh, "The dog").read() == text


class TestCancelling:
    def test_from_another_thread_between_tokens(self, stories: sr.Model) -> None:
        generation = greedy(stories, max_tokens=400, ignore_eos=True)
        seen = 0
        for _ in generation:
            seen += 1
            if seen == 3:
                thread = threading.Thread(target=generation.cancel)
                thread.start()
                thread.join()
        assert generation.finish_reason == "cancelled" and seen <= 4
        assert generation.cancelled

    def test_from_another_thread_within_the_prompt(self, smollm2: sr.Model) -> None:
        with smollm2.session() as session:
            prompt = [1, *[500 + i % 400 for i in range(2000)]]
            generation = greedy(session, prompt)
            timer = threading.Timer(0.05, generation.cancel)
            started = time.perf_counter()
            timer.start()
            assert generation.read() == ""
            seconds = time.perf_counter() - started
            timer.join()
            assert generation.finish_reason == "cancelled" and generation.tokens == []
            assert session.n_past < len(prompt)
            whole = greedy(session, prompt, max_tokens=1)  # the session goes on, and with what it has
            whole.read()
            assert whole.tokens and seconds < whole.timings.prompt_seconds + 0.05

    def test_a_cancel_that_comes_too_late_does_not_hit_the_next_one(self, stories: sr.Model) -> None:
        with stories.session() as session:
            wanted = greedy(session).read()
            session._opened().cancel()  # as if the flag were set just after the last evaluation
            assert greedy(session).read() == wanted
            finished = greedy(session)
            finished.read()
            finished.cancel()
            assert finished.finish_reason == "length" and greedy(session).read() == wanted

    def test_leaving_the_loop_the_block_or_the_last_reference(self, stories: sr.Model) -> None:
        left = greedy(stories)
        for _ in left:
            break
        assert left.finish_reason == "cancelled"
        with greedy(stories) as block:
            next(block)
        assert block.finish_reason == "cancelled"
        session = stories.session()
        dropped = greedy(session)
        next(dropped)
        del dropped
        gc.collect()
        assert session._generation is None
        session.close()

    def test_ctrl_c_within_a_long_prompt_reaches_the_program(self, smollm2_packed: Path) -> None:
        program = f"""
import sparse_run as sr, signal, threading, os, time
model = sr.Model({str(smollm2_packed)!r}, threads=2, ctx_size=2048)
generation = model.generate([1] + [500 + i % 400 for i in range(2000)], temperature=0, max_tokens=2)
threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    generation.read()
except KeyboardInterrupt:
    print("interrupted", generation.finish_reason)
print(len(model.generate("Hello", max_tokens=2, temperature=0).read()) > 0)
"""
        done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
        assert done.stdout.split("\n")[:2] == ["interrupted cancelled", "True"], done.stderr

    def test_closing_a_session_or_the_model_stops_what_runs_elsewhere(self, stories_packed: Path) -> None:
        model = sr.Model(stories_packed, threads=1)
        session = model.session(ctx_size=512)
        generation = greedy(session, max_tokens=None, ignore_eos=True)
        outcome: list[str | None] = []

        def consume() -> None:
            generation.read()
            outcome.append(generation.finish_reason)

        thread = threading.Thread(target=consume)
        thread.start()
        while not generation.tokens:
            time.sleep(0.001)
        model.close()
        thread.join(10)
        assert not thread.is_alive() and outcome in (["cancelled"], ["length"])


class TestThreads:
    def test_two_sessions_of_one_model_at_once_give_what_each_gives_alone(self, stories: sr.Model) -> None:
        prompts = [STORY, "The little dog", "One day, Tim", "Lily and her mom"]
        alone = [greedy(stories, prompt, max_tokens=60).read() for prompt in prompts]
        results: dict[int, list[str]] = {}

        def work(i: int) -> None:
            with stories.session() as session:
                results[i] = [greedy(session, prompts[i], max_tokens=60).read() for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [results[i] for i in range(len(prompts))] == [[text] * 3 for text in alone]

    def test_generate_of_the_model_may_be_called_from_several_threads(self, stories: sr.Model) -> None:
        wanted = greedy(stories).read()
        texts: list[str] = []
        threads = [threading.Thread(target=lambda: texts.append(greedy(stories).read())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert texts == [wanted] * 4

    def test_python_runs_while_the_core_computes(self, smollm2: sr.Model) -> None:
        """The GIL is released: another thread gets on during one long evaluation."""
        ticks = 0
        running = True

        def tick() -> None:
            nonlocal ticks
            while running:
                ticks += 1
                time.sleep(0.001)

        with smollm2.session() as session:
            thread = threading.Thread(target=tick)
            thread.start()
            generation = greedy(session, [1, *range(500, 1012)], max_tokens=1)
            generation.read()
            running = False
            thread.join()
        assert ticks > 0.1 * generation.timings.prompt_seconds / 0.002

    def test_one_session_in_two_threads_is_refused(self, smollm2: sr.Model) -> None:
        with smollm2.session() as session:
            generation = greedy(session, [1, *range(500, 1500)], max_tokens=1)
            thread = threading.Thread(target=generation.read)
            thread.start()
            time.sleep(0.05)
            with pytest.raises(sr.Error, match="in use by another thread"):
                session.logits([1, 2, 3])
            thread.join()


class TestModel:
    def test_tokens_and_text(self, smollm2: sr.Model) -> None:
        ids = smollm2.tokenize("Hello world")
        assert ids == [19556, 905] and smollm2.detokenize(ids) == "Hello world"
        assert smollm2.detokenize([1, *ids]) == "Hello world"

    def test_logits_do_not_depend_on_what_was_computed_before(self, smollm2: sr.Model) -> None:
        ids = smollm2.tokenize("The quick brown fox jumps over the lazy dog.")
        first = smollm2.logits(ids)
        greedy(smollm2, "Something else").read()
        assert np.array_equal(first, smollm2.logits(ids))

    def test_facts(self, smollm2: sr.Model, smollm2_packed: Path) -> None:
        assert smollm2.path == smollm2_packed and smollm2.threads == 2
        assert smollm2.n_vocab == 49152 and smollm2.n_ctx_train == 8192 and smollm2.ctx_size == 2048
        assert 50e6 < smollm2.bytes_per_token <= smollm2.weight_bytes < 110e6
        assert smollm2.isa in {"generic", "avx2", "avx512", "neon"}

    def test_weights_are_mapped_or_read_as_asked_and_logits_are_the_same(self, smollm2_packed: Path) -> None:
        logits = []
        for mmap in (True, False):
            with sr.load(smollm2_packed, threads=2, ctx_size=256, mmap=mmap) as model:
                assert model.mapped is mmap
                logits.append(model.logits(model.tokenize("The quick brown fox")))
        assert np.array_equal(*logits)

    def test_the_context_is_the_models_own_at_most_4096(self, smollm2_packed: Path, stories_packed: Path) -> None:
        with sr.Model(smollm2_packed) as model:
            assert model.ctx_size == 4096
        with sr.Model(stories_packed) as model:
            assert model.ctx_size == model.n_ctx_train == 512

    def test_a_gguf_file_is_converted_once(
        self, stories_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # other tests may have converted the same content
        calls: list[tuple[str, int, int]] = []
        with sr.load(stories_gguf, progress=lambda *call: calls.append(call)) as model:
            first = model.path
        assert calls and calls[-1][1] == calls[-1][2]
        calls.clear()
        with sr.load(str(stories_gguf), progress=lambda *call: calls.append(call)) as model:
            assert model.path == first and not calls

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": -0.1},
            {"temperature": float("nan")},
            {"top_k": -1},
            {"top_p": 0},
            {"top_p": 1.5},
            {"min_p": 2},
            {"repeat_penalty": 0},
            {"repeat_last_n": -2},
            {"seed": -2},
            {"max_tokens": -1},
            {"stop": [3]},
            {"temperature": "hot"},
            {"top_k": None},
        ],
    )
    def test_impossible_options_are_usage_errors(self, options: dict[str, Any], stories: sr.Model) -> None:
        with pytest.raises(sr.UsageError):
            stories.generate(STORY, **options)

    # Bytes are numbers, but no tokens.
    @pytest.mark.parametrize("ids", [[], [-1], [512], [10**12], [1.5], ["Once"], b"Once"])
    def test_impossible_ids_are_usage_errors(self, ids: Any, stories: sr.Model) -> None:
        for call in (stories.generate, stories.logits):
            with pytest.raises(sr.UsageError):
                call(ids)

    def test_a_closed_model_or_session_says_so(self, stories_packed: Path) -> None:
        model = sr.Model(stories_packed)
        session = model.session()
        session.close()
        with pytest.raises(sr.UsageError, match="closed"):
            session.generate(STORY)
        model.close()
        model.close()
        with pytest.raises(sr.UsageError, match="closed"):
            model.generate(STORY)

    def test_what_a_process_holds_is_not_copied_and_says_so(self, stories_packed: Path) -> None:
        with sr.Model(stories_packed) as model, model.session() as session:
            for held in (model, session, session.generate(STORY)):
                for copied in (pickle.dumps, copy.copy, copy.deepcopy):
                    with pytest.raises(TypeError, match=f"a {type(held).__name__} cannot be .* sparse_run.load"):
                        copied(held)
            assert model.name in repr(model) and f"{model.threads} threads" in repr(model)
        assert "closed" in repr(model)

    def test_a_missing_model_is_a_model_error(self, tmp_path: Path) -> None:
        with pytest.raises(sr.ModelError):
            sr.load(tmp_path / "nothing.gguf")
        with pytest.raises(sr.ModelError):
            sr.Model(tmp_path)

    def test_impossible_threads_and_contexts_are_usage_errors(self, stories_packed: Path, stories: sr.Model) -> None:
        for options in ({"threads": 0}, {"threads": -3}, {"ctx_size": 0}):
            with pytest.raises(sr.UsageError):
                sr.Model(stories_packed, **options)
        with pytest.raises(sr.UsageError):
            stories.session(ctx_size=-1)


class TestQuiet:
    def test_nothing_is_printed(self, stories_packed: Path) -> None:
        program = (
            f"import sparse_run as sr\nwith sr.Model({str(stories_packed)!r}, ctx_size=1024) as m:\n"
            f"    m.generate('Once', max_tokens=3).read()\n    m.chat([{{'role': 'user', 'content': 'x'}}], max_tokens=2).read()"
        )
        done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_warnings_go_through_logging(self, stories_packed: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="sparse_run"), sr.Model(stories_packed, ctx_size=1024):
            pass
        assert "trained for 512" in caplog.text

    def test_so_does_what_the_core_says(self, stories_packed: Path, caplog: pytest.LogCaptureFixture) -> None:
        from sparse_run.model import _hear_core

        _hear_core.cache_clear()  # another test may have sent the core's messages elsewhere
        with caplog.at_level(logging.INFO, logger="sparse_run"), sr.Model(stories_packed):
            pass
        assert f"{stories_packed}: " in caplog.text and "instruction set" in caplog.text


class TestImport:
    def test_importing_loads_nothing_heavy(self) -> None:
        program = (
            "import sys, sparse_run; "
            "heavy = {'numpy', 'tokenizers', 'sentencepiece', 'jinja2', 'click', 'gguf', 'sparse_run._core', 'logging'}; "
            "print(sorted(heavy & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == "[]"

    def test_importing_takes_less_than_150_ms(self) -> None:
        program = "import time; t = time.process_time(); import sparse_run; print(time.process_time() - t)"
        times = [
            float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60).stdout)
            for _ in range(3)
        ]
        assert min(times) < 0.15

    def test_everything_public_is_there_and_nothing_else(self) -> None:
        for name in sr.__all__:
            assert getattr(sr, name) is not None
        assert set(sr.__all__) <= set(dir(sr))
        with pytest.raises(AttributeError):
            _ = sr.no_such_thing  # type: ignore[attr-defined]
        assert (Path(sr.__file__).parent / "py.typed").is_file()
