"""`sparse-run eval`: perplexity of a model on a text, what sparsity costs there, and multiple-choice tasks."""

from __future__ import annotations

import click

from ..errors import UsageError
from ..eval.choice import TASKS
from ..memory import parse_size
from .common import (
    Progress,
    Work,
    budget_option,
    check_device_memory,
    device_options,
    json_option,
    model_option,
    print_json,
    read_text,
    say_budget,
    sparsity_option,
    threads_option,
    verbosity_options,
)

_CHARACTERS_PER_TOKEN = 12  # more than any tokenizer makes of a token on average: tokenize no more text than is scored


@click.command("eval")
@model_option
@threads_option
@device_options
@sparsity_option
@budget_option
@click.option("--text", "text_file", metavar="FILE", help="The text, UTF-8; - is standard input.")
@click.option("--task", type=click.Choice(TASKS), help="Answer multiple-choice questions instead of scoring a text.")
@click.option("--data", metavar="FILE", help="The task's questions, JSON lines (hellaswag: also its text form).")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N questions only.")
@click.option("--ctx", type=click.IntRange(min=4), default=512, show_default=True, help="Tokens of a chunk.")
@click.option(
    "--chunks", type=click.IntRange(min=0), default=20, show_default=True, help="Chunks to score; 0 is the whole text."
)
@json_option
@verbosity_options
def command(
    model: str | None,
    threads: int | None,
    device: str,
    device_memory: str | None,
    sparsity: str | None,
    memory_budget: str | None,
    text_file: str | None,
    task: str | None,
    data: str | None,
    limit: int | None,
    ctx: int,
    chunks: int,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Measure perplexity: how surprised the model is by a text (lower is better).

    The text is cut into chunks of CTX tokens and the second half of each is scored, as llama.cpp's perplexity tool does,
    so that figures can be compared. With --sparsity the text runs dense and sparse: the perplexity is the sparse run's, as
    decoding gives it, and perplexity_dense, kl_mean, kl_p99, top1_agreement and density say how it differs. A method that
    chooses from the prompt takes the first half of a chunk for it.

    \b
    sparse-run eval -m model.gguf --text wiki.test.raw
    sparse-run eval -m model.gguf --text wiki.test.raw --ctx 512 --chunks 20 --json
    sparse-run eval -m model.gguf --text wiki.test.raw --sparsity 0.4 --json
    sparse-run eval -m model.gguf --task piqa --data piqa.jsonl --sparsity 0.4
    """
    import json

    from .. import _core, registry
    from ..eval import SparseResult, compare, perplexity
    from ..eval.perplexity import LOGIT_BYTES, LOGIT_COPIES
    from ..packed_header import read_header
    from ..skipping import bind
    from ..sparsity import choose
    from ..tokenizer import Tokenizer

    if (task is None) == (text_file is None):
        raise click.UsageError("give --text FILE to measure perplexity, or --task NAME with --data FILE")
    budget = 0 if memory_budget is None else parse_size(memory_budget)
    on_device = check_device_memory(device, device_memory)
    if budget and (task is not None or sparsity not in (None, "off")):
        raise click.UsageError("--memory-budget goes with --text and no --sparsity: what they hold is not counted in it")
    if task is not None:
        _task(model, threads, device, on_device, sparsity, task, data, limit, as_json=as_json, quiet=quiet)
        return
    assert text_file is not None
    text = read_text(text_file).replace("\r\n", "\n").replace("\r", "\n")
    with Progress(quiet=quiet) as progress:
        path = registry.resolve(model, progress=progress)
        tokenizer = Tokenizer.load(path)
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        if chunks:
            text = text[: ctx * chunks * _CHARACTERS_PER_TOKEN]
        ids = tokenizer.encode(text, parse_special=False)
        held = min(LOGIT_BYTES, budget // 64) if budget else LOGIT_BYTES
        core = _core.Model(
            str(path),
            threads or 0,
            memory_budget=budget,
            n_ctx=ctx if budget else 0,
            extra_bytes=held * LOGIT_COPIES if budget else 0,
            device=device,
            device_memory=on_device,
            progress=lambda done, total: progress("loading", done, total),
        )
        try:
            if budget and not quiet:
                say_budget(core.memory())
            config = json.loads(core.config_json)
            file = skipping = None
            if sparsity is not None and sparsity != "off":
                say = None if quiet else lambda line: click.echo(line, err=True)
                with Work(quiet=quiet) as work:
                    file = choose(sparsity, read_header(path), core, tokenizer, say=say, tick=work)
            if file is not None:
                skipping = bind(file, core)
            options = {"n_vocab": config["n_vocab"], "ctx": ctx, "chunks": chunks or None, "bos": bos}
            try:
                result = (
                    perplexity(core, ids, **options, logit_bytes=held, progress=progress)
                    if skipping is None
                    else compare(core, ids, skipping, **options, progress=progress)
                )
            except UsageError as error:
                raise UsageError(f"{text_file}: {error}") from None
            isa, used_threads = core.isa, core.threads
        finally:
            core.close()
    if chunks and result.chunks < chunks and not quiet:
        click.echo(f"{text_file} has only {result.chunks} chunks of {ctx} tokens", err=True)
    by_prompt = skipping is not None and skipping.by_prompt
    if as_json:
        extra: dict[str, object] = {"sparsity": file.name} if file is not None else {}
        if by_prompt:
            extra["prompt_tokens"] = ctx // 2
        found = {"model": config.get("name", path.name), **extra, **result.as_dict()}
        print_json({**found, "threads": used_threads, "isa": isa})
    elif isinstance(result, SparseResult):
        sites = ", ".join(f"{site} {share:.1%}" for site, share in result.density.items() if site != "body")
        click.echo(
            f"perplexity {result.perplexity:.4f}   dense {result.perplexity_dense:.4f} "
            f"({result.perplexity / result.perplexity_dense - 1:+.2%}); {result.tokens_scored} tokens in {result.chunks} "
            f"chunks of {result.ctx}, {result.seconds:.1f} s\n"
            f"KL {result.kl_mean:.5f} a token, 99% below {result.kl_p99:.4f}; the same first choice for "
            f"{result.top1_agreement:.1%}\n"
            f"reads {result.density.get('body', 1.0):.1%} of the layers' weights ({sites})"
            + (f"; chosen from the first {ctx // 2} tokens of each chunk, read dense" if by_prompt else "")
        )
    else:
        click.echo(
            f"perplexity {result.perplexity:.4f}   {result.tokens_scored} tokens in {result.chunks} chunks of {ctx}, "
            f"{result.seconds:.1f} s"
        )


def _task(
    model: str | None,
    threads: int | None,
    device: str,
    device_memory: int,
    sparsity: str | None,
    task: str,
    data: str | None,
    limit: int | None,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Answers the questions of a task, dense or sparse."""
    import json

    from .. import _core, registry
    from ..eval.choice import read_questions, score
    from ..packed_header import read_header
    from ..skipping import bind
    from ..sparsity import choose
    from ..tokenizer import Tokenizer

    if data is None:
        raise click.UsageError("--task needs its questions: --data FILE")
    questions = read_questions(data, task, limit)
    with Progress(quiet=quiet) as progress:
        path = registry.resolve(model, progress=progress)
        tokenizer = Tokenizer.load(path)
        core = _core.Model(str(path), threads or 0, device=device, device_memory=device_memory)
        try:
            config = json.loads(core.config_json)
            file = None
            if sparsity is not None and sparsity != "off":
                say = None if quiet else lambda line: click.echo(line, err=True)
                with Work(quiet=quiet) as work:
                    file = choose(sparsity, read_header(path), core, tokenizer, say=say, tick=work)
            result = score(
                core,
                tokenizer,
                questions,
                task=task,
                n_ctx=min(1024, config["n_ctx_train"]),
                plan=bind(file, core) if file is not None else None,
                progress=progress,
            )
        finally:
            core.close()
    extra = {"sparsity": file.name} if file is not None else {}
    if as_json:
        print_json({"model": config.get("name", path.name), **extra, **result.as_dict()})
    else:
        click.echo(
            f"{task} {result.accuracy:.1%} +- {result.stderr:.1%} by likelihood per byte, {result.accuracy_raw:.1%} by "
            f"likelihood; {result.questions} questions, {result.seconds:.1f} s"
        )
