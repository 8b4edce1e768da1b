"""`sparse-run chat` in a pseudo-terminal and with piped input, and the conversation behind it."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
import sparse_run as sr
from sparse_run.chat_state import Conversation, write_atomically

Run = Callable[..., Any]
Spawn = Callable[..., Any]
PROMPT = ">>> "


@pytest.fixture
def spawn(stories_packed: Path, tmp_path: Path) -> Iterator[Spawn]:
    """A chat with the tiny story model in a terminal, past its first prompt; answers have at most 12 tokens."""
    children = []

    def start(
        *arguments: Any, model: Path = stories_packed, env: dict[str, str] | None = None, prompt: bool = True
    ) -> Any:
        child = pexpect.spawn(
            sys.executable,
            ["-m", "sparse_run", "chat", "-m", str(model), "--temp", "0", *map(str, arguments)],
            env={**os.environ, "TERM": "dumb", "XDG_STATE_HOME": str(tmp_path / "state"), **(env or {})},
            encoding="utf-8",
            timeout=60,
            dimensions=(40, 200),
        )
        children.append(child)
        if prompt:
            child.expect_exact(PROMPT)
        return child

    yield start
    for child in children:
        child.close(force=True)


def left(child: Any) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return int(child.exitstatus)


def say(child: Any, text: str, answer: str = PROMPT) -> str:
    """Sends a line, waits for the next prompt (or `answer`), and returns what was shown between."""
    child.sendline(text)
    child.expect_exact(answer)
    return str(child.before).replace("\r", "").partition("\n")[2]


def saved(child: Any, tmp_path: Path) -> list[dict[str, str]]:
    say(child, f"/save {tmp_path / 'saved.json'}")
    messages: list[dict[str, str]] = json.loads((tmp_path / "saved.json").read_text())["messages"]
    return messages


class TestTerminal:
    def test_greets_answers_and_leaves_with_ctrl_d(self, spawn: Spawn) -> None:
        child = spawn("-n", 12, prompt=False)
        child.expect_exact("/help lists the commands")
        child.expect_exact(PROMPT)
        assert len(say(child, "Tell me about a dog").strip()) > 5
        child.sendeof()
        assert left(child) == 0

    def test_a_model_that_was_not_trained_to_chat_is_told_at_the_beginning(
        self, spawn: Spawn, smollm2_packed: Path
    ) -> None:
        child = spawn(prompt=False)
        child.expect_exact(PROMPT)
        assert "no chat template" in child.before
        for arguments in ({"model": smollm2_packed}, {"env": {"SPARSE_RUN_CHAT_TEMPLATE": "chatml"}}):
            child = spawn(prompt=False, **arguments)
            child.expect_exact(PROMPT)
            assert "template" not in child.before and "lists the commands" in child.before

    @pytest.mark.parametrize("word", ["/exit", "/bye", "/quit"])
    def test_leaves_by_command(self, word: str, spawn: Spawn) -> None:
        child = spawn()
        child.sendline(word)
        assert left(child) == 0

    def test_ctrl_c_stops_the_answer_and_not_the_program(
        self, spawn: Spawn, smollm2_packed: Path, tmp_path: Path
    ) -> None:
        child = spawn(model=smollm2_packed)
        child.sendline("Write a very long story about the sea.")
        child.expect_exact("the sea.\r\n")
        child.expect(r"\w+ \w+ \w+ \w+ \w+ \w+")
        child.sendintr()
        child.expect_exact("(stopped)")
        child.expect_exact(PROMPT)
        messages = saved(child, tmp_path)
        assert [message["role"] for message in messages] == ["user", "assistant"] and messages[1]["content"]
        say(child, "/set max-tokens 4")
        assert say(child, "And now?").strip()
        child.sendeof()
        assert left(child) == 0

    def test_ctrl_c_within_a_long_prompt_takes_the_question_back(
        self, spawn: Spawn, smollm2_packed: Path, tmp_path: Path
    ) -> None:
        document = tmp_path / "long.txt"
        document.write_text("Many words are in this text. " * 1100)
        child = spawn("-f", document, "-c", 8192, model=smollm2_packed, prompt=False)
        child.expect_exact("leaves.")
        time.sleep(1)  # the prompt takes several
        child.sendintr()
        child.expect_exact("(stopped)")
        child.expect_exact(PROMPT)
        assert saved(child, tmp_path) == []

    def test_ctrl_c_before_the_first_word_is_no_exception(self, spawn: Spawn, smollm2_packed: Path) -> None:
        child = spawn(model=smollm2_packed)
        for _ in range(5):
            child.sendline("Write a very long story about the sea.")
            child.expect_exact("the sea.\r\n")
            child.sendintr()  # wherever it hits: template, tokenizer, prompt, answer
            child.expect_exact("(stopped)")
            child.expect_exact(PROMPT)
        child.sendeof()
        assert left(child) == 0

    def test_ctrl_c_twice_leaves(self, spawn: Spawn) -> None:
        child = spawn()
        child.send("half a line")
        child.expect_exact("half a line")
        child.sendintr()
        child.expect_exact("Ctrl-C again or Ctrl-D leaves.")
        child.expect_exact(PROMPT)
        child.sendintr()
        assert left(child) == 130

    def test_messages_of_several_lines(self, spawn: Spawn, tmp_path: Path) -> None:
        child = spawn("-n", 3)
        say(child, '"""first', "... ")
        say(child, "", "... ")
        say(child, "second", "... ")
        say(child, 'third"""')
        say(child, "one \\", "... ")
        say(child, "two")
        say(child, '"""on one line"""')
        contents = [message["content"] for message in saved(child, tmp_path) if message["role"] == "user"]
        assert contents == ["first\n\nsecond\nthird", "one \ntwo", "on one line"]

    def test_ctrl_d_ends_a_message_that_was_begun(self, spawn: Spawn, tmp_path: Path) -> None:
        child = spawn("-n", 3)
        say(child, '"""first', "... ")
        say(child, "second", "... ")
        child.sendeof()
        child.expect_exact(PROMPT)
        assert saved(child, tmp_path)[0]["content"] == "first\nsecond"

    def test_commands(self, spawn: Spawn, tmp_path: Path) -> None:
        child = spawn("-n", 6)
        shown = say(child, "/help")
        for name in ("/system", "/set", "/show", "/clear", "/undo", "/retry", "/save", "/load", "/stats", "/exit"):
            assert name in shown
        assert say(child, "/?") == shown
        assert "no command /nonsense" in say(child, "/nonsense")
        assert "no answer yet" in say(child, "/stats")
        assert "no message to answer" in say(child, "/retry")
        assert "nothing to undo" in say(child, "/undo")
        say(child, "/system Speak of dogs.")
        assert "Speak of dogs." in say(child, "/system")
        first = say(child, "Hello")
        assert "answer 6 tokens" in say(child, "/stats")
        assert say(child, "/retry") == first
        say(child, "/set temp 0.5")
        say(child, "/set top_k 7")
        shown = say(child, "/show")
        assert "temp 0.5" in shown and "top-k 7" in shown and "Speak of dogs." in shown and "2 messages" in shown
        assert "error: " in say(child, "/set temp hot") and "error: " in say(child, "/set temp -1")
        assert "no setting 'colour'" in say(child, "/set colour red")
        assert "no setting 'colour'" in say(child, "/set colour")  # not: it needs a value
        assert "needs a value; it is 0.5" in say(child, "/set temp")
        assert "start it with -c N" in say(child, "/set num_ctx 9")
        assert "error" not in say(child, "/set parameter top_k 8") and "top-k 8" in say(child, "/show")
        assert "temp 0.5" in say(child, "/show")
        say(child, "/set verbose on")
        assert "first token after" in say(child, "More")
        say(child, "/set verbose off")
        assert "first token after" not in say(child, "More")
        say(child, "/undo")
        assert len(saved(child, tmp_path)) == 4
        say(child, "/clear")
        assert saved(child, tmp_path) == []

    def test_a_saved_conversation_goes_on_where_it_was(self, spawn: Spawn, tmp_path: Path) -> None:
        first = spawn("-n", 8, "-sys", "Tell stories.")
        say(first, "Tell me about Tim")
        say(first, f"/save {tmp_path / 'talk.json'}")
        answer = say(first, "And then?")
        second = spawn("-n", 3)
        assert "loaded 2 messages" in say(second, f"/load {tmp_path / 'talk.json'}")
        assert say(second, "And then?") == answer
        assert "Tell stories." in say(second, "/system")

    def test_files_that_cannot_be_saved_or_loaded_are_named(self, spawn: Spawn, tmp_path: Path) -> None:
        child = spawn("-n", 3)
        say(child, "Hello")
        assert "missing.json" in say(child, f"/load {tmp_path / 'missing.json'}")
        (tmp_path / "other.json").write_text('{"schema": 1, "messages": [{"role": "robot", "content": "x"}]}')
        assert "not a saved conversation" in say(child, f"/load {tmp_path / 'other.json'}")
        assert "error: " in say(child, f"/save {tmp_path / 'no-such-folder' / 'x.json'}")
        assert len(saved(child, tmp_path)) == 2

    def test_history_is_kept_in_the_state_folder_and_recalled(self, spawn: Spawn, tmp_path: Path) -> None:
        first = spawn("-n", 3)
        say(first, "an earlier message")
        first.sendeof()
        left(first)
        history = tmp_path / "state" / "sparse-run" / "history"
        assert "an earlier message" in history.read_text()
        second = spawn("-n", 3)
        second.send("\x1b[A")
        second.expect_exact("an earlier message")
        second.send("\n")
        second.expect_exact(PROMPT)
        assert saved(second, tmp_path)[0]["content"] == "an earlier message"

    def test_a_history_that_cannot_be_kept_is_no_obstacle(self, spawn: Spawn, tmp_path: Path) -> None:
        (tmp_path / "state").write_text("a file where a folder should be")
        child = spawn("-n", 3)
        say(child, "Hello")
        child.sendeof()
        child.expect_exact("history could not be kept")
        assert left(child) == 0

    @pytest.mark.parametrize(
        ("environment", "coloured"),
        [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    )
    def test_colour_only_where_it_is_wanted(self, environment: dict[str, str], coloured: bool, spawn: Spawn) -> None:
        child = spawn("-n", 3, env=environment, prompt=False)
        child.expect_exact(">>> ")
        assert ("\x1b[2m" in child.before) == coloured and ("\x1b[1m" in child.before) == coloured

    def test_an_opening_prompt_comes_first_and_the_talk_goes_on(self, spawn: Spawn, tmp_path: Path) -> None:
        child = spawn("-n", 3, "-p", "Hello there")
        say(child, "More")
        contents = [message["content"] for message in saved(child, tmp_path) if message["role"] == "user"]
        assert contents == ["Hello there", "More"]

    def test_answers_alone_go_to_a_redirected_stdout(self, stories_packed: Path, tmp_path: Path) -> None:
        out = tmp_path / "answers.txt"
        command = f"{sys.executable} -m sparse_run chat -m {stories_packed} --temp 0 -n 5 > {out}"
        child = pexpect.spawn("bash", ["-c", command], encoding="utf-8", timeout=60, env={**os.environ, "TERM": "dumb"})
        child.expect_exact(PROMPT)
        child.sendline("Hello")
        child.expect_exact(PROMPT)
        child.sendeof()
        assert left(child) == 0
        with sr.Model(stories_packed) as model:
            answer = model.chat([{"role": "user", "content": "Hello"}], temperature=0, max_tokens=5).read()
        assert out.read_text() == answer + "\n"

    def test_a_message_too_long_for_the_context_is_refused_and_the_talk_goes_on(
        self, spawn: Spawn, tmp_path: Path
    ) -> None:
        child = spawn("-c", 64, "-n", 8)
        say(child, "Hello")
        assert "does not fit" in say(child, "word " * 100)
        assert len(saved(child, tmp_path)) == 2
        assert say(child, "Hello again").strip()


class TestPiped:
    @pytest.fixture
    def chat(self, run_cli: Run, stories_packed: Path) -> Run:
        def run(*arguments: Any, **options: Any) -> Any:
            return run_cli("chat", "-m", stories_packed, "--temp", "0", "-n", "8", *arguments, **options)

        return run

    @pytest.fixture
    def answers(self, stories_packed: Path) -> Callable[..., str]:
        """What stdout should be for these messages."""

        def talk(*messages: str, system: str | None = None) -> str:
            with sr.Model(stories_packed) as model, model.session() as session:
                conversation = Conversation(model, session, sr.Sampling(temperature=0), max_tokens=8, system=system)
                text = ""
                for message in messages:
                    generation, _ = conversation.ask(message)
                    generation.read()
                    conversation.answered(generation)
                    text += generation.text if generation.text.endswith("\n") else generation.text + "\n"
                return text

        return talk

    def test_each_line_is_a_message_and_only_answers_are_on_stdout(
        self, chat: Run, answers: Callable[..., str]
    ) -> None:
        done = chat(input="Hello\n\nTell me more\n")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout == answers("Hello", "Tell me more")

    def test_blocks_continued_lines_and_commands_work(self, chat: Run, answers: Callable[..., str]) -> None:
        done = chat(input='"""a\nb"""\nc\\\nd\n/clear\ne\\')
        assert done.stdout == answers("a\nb", "c\nd") + answers("e") and "forgotten" in done.stderr
        assert chat(input="Hello\n/exit\nMore\n").stdout == answers("Hello")

    def test_a_whole_document_is_one_message(self, chat: Run, answers: Callable[..., str]) -> None:
        text = "/not a command\n\nsecond line"
        assert chat("-f", "-", input=text).stdout == answers(text)
        assert chat("-f", "-", "-p", "Look:", input=text).stdout == answers("Look:\n\n" + text)

    def test_an_opening_prompt_is_answered_once_without_reading_stdin(
        self, chat: Run, answers: Callable[..., str]
    ) -> None:
        assert chat("-p", "Hello", input="never read\n").stdout == answers("Hello")

    def test_run_is_chat_and_the_system_prompt_counts(
        self, run_cli: Run, stories_packed: Path, answers: Callable[..., str]
    ) -> None:
        done = run_cli(
            "run", stories_packed, "--temp", "0", "-n", "8", "-sys", "Lily had a big red ball.", "-p", "Hello"
        )
        assert done.stdout == answers("Hello", system="Lily had a big red ball.") != answers("Hello")

    def test_no_escape_sequences(self, chat: Run) -> None:
        done = chat("-v", input="Hello\n/show\n/help\n")
        assert "\x1b" not in done.stdout + done.stderr and "first token after" in done.stderr

    def test_quiet_leaves_only_answers(self, chat: Run) -> None:
        assert chat("-q", "-v", input="Hello\n/clear\nMore\n").stderr == ""

    def test_a_context_that_fills_up_forgets_the_oldest_with_a_notice(self, chat: Run) -> None:
        done = chat("-c", "96", input="Tell me a story about a dog.\n" * 8)
        assert done.returncode == 0 and len(done.stdout.strip().split("\n")) >= 8
        assert "the oldest 2 messages are forgotten" in done.stderr

    def test_a_full_context_cuts_the_answer_with_a_notice(self, chat: Run) -> None:
        done = chat("-c", "32", "-n", "-1", input="Tell me a story.\n")
        assert done.returncode == 0 and "the answer is cut short; /clear" in done.stderr

    def test_a_message_that_cannot_fit_is_exit_1(self, chat: Run) -> None:
        done = chat("-c", "32", input="word " * 100)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("sparse-run: error: the message")

    def test_nothing_in_nothing_out(self, chat: Run) -> None:
        done = chat(input="")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert chat("-p", "  ").returncode == 2

    def test_templates_may_be_given(self, chat: Run, tmp_path: Path, answers: Callable[..., str]) -> None:
        assert chat("--chat-template", "plain", "-p", "Hello").stdout == answers("Hello")
        file = tmp_path / "t.jinja"
        file.write_text("{{ messages[-1].content }}")
        assert chat("--chat-template-file", file, "-p", "Once upon a time").returncode == 0
        file.write_text("{% if %}")
        done = chat("--chat-template-file", file, "-p", "x")
        assert done.returncode == 4 and "not valid" in done.stderr and done.stderr.count("\n") == 1


class TestConversation:
    @pytest.fixture
    def conversation(self, stories_packed: Path) -> Iterator[Conversation]:
        with sr.Model(stories_packed) as model, model.session(ctx_size=128) as session:
            yield Conversation(model, session, sr.Sampling(temperature=0), max_tokens=8, system="A story.")

    @staticmethod
    def ask(conversation: Conversation, text: str) -> tuple[str, int]:
        generation, forgotten = conversation.ask(text)
        generation.read()
        conversation.answered(generation)
        return generation.text, forgotten

    def test_earlier_turns_are_not_computed_again(self, conversation: Conversation) -> None:
        self.ask(conversation, "The dog")
        generation, _ = conversation.ask("The cat")
        generation.read()
        assert generation.timings.cached_tokens > 10
        assert generation.timings.prompt_tokens < len(generation.prompt_tokens) - 10

    def test_forgetting_keeps_the_system_prompt_and_begins_with_the_user(self, conversation: Conversation) -> None:
        forgotten = [self.ask(conversation, f"Tell me of number {i}, the dog and the cat.")[1] for i in range(8)]
        assert sum(forgotten) > 0 and all(count % 2 == 0 for count in forgotten)
        assert conversation.messages[0] == {"role": "system", "content": "A story."}
        assert conversation.turns[0]["role"] == "user" and conversation.turns[-2]["content"].startswith(
            "Tell me of number 7"
        )

    def test_a_failed_question_leaves_everything_as_it_was(self, conversation: Conversation) -> None:
        self.ask(conversation, "The dog")
        before = list(conversation.turns)
        with pytest.raises(sr.ContextLengthError, match="context holds 128"):
            conversation.ask("word " * 200)
        assert conversation.turns == before

    def test_saving_is_all_or_nothing(
        self, conversation: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "talk.json"
        target.write_text("old")

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", fail)
            with pytest.raises(OSError, match="No space"):
                conversation.save(target)
        assert target.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["talk.json"]
        conversation.save(target)
        assert json.loads(target.read_text())["schema"] == 1

    def test_saved_files_have_the_usual_permissions(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            write_atomically(tmp_path / "x", "text")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "[]",
            "[" * 100_000,
            '{"schema": 1}',
            '{"schema": 2, "messages": []}',
            '{"schema": 1, "messages": [3]}',
            '{"schema": 1, "messages": [{"role": "user"}]}',
            '{"schema": 1, "messages": [], "system": 3}',
            '{"schema": 1, "messages": [], "settings": {"temperature": "hot"}}',
            '{"schema": 1, "messages": [], "settings": {"temperature": -1}}',
            '{"schema": 1, "messages": [], "settings": {"top_k": 1.5}}',
            '{"schema": 1, "messages": [], "settings": {"max_tokens": -7}}',
        ],
    )
    def test_loading_something_else_changes_nothing(
        self, content: str, conversation: Conversation, tmp_path: Path
    ) -> None:
        (tmp_path / "x.json").write_text(content)
        self.ask(conversation, "The dog")
        before = (list(conversation.turns), conversation.sampling, conversation.system)
        with pytest.raises(sr.UsageError):
            conversation.load(tmp_path / "x.json")
        assert (conversation.turns, conversation.sampling, conversation.system) == before

    def test_settings_by_the_names_of_their_flags(self, conversation: Conversation) -> None:
        conversation.set("--temp", "0.25")
        conversation.set("top_p", "0.5")
        conversation.set("n", "17")
        assert conversation.sampling.temperature == 0.25 and conversation.sampling.top_p == 0.5
        assert conversation.max_tokens == 17 and conversation.settings()["temp"] == 0.25
        for name, value in (("seed", "1.5"), ("temp", "x"), ("max-tokens", "-2"), ("nothing", "1")):
            with pytest.raises(sr.UsageError):
                conversation.set(name, value)
