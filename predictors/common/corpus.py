"""Calibration tokens: text that the model makes itself from short openings, and the user's text, in chunks of one length.

What a model reads while it decodes is mostly its own text, so half of the corpus is made by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ... import _core
    from ...tokenizer import Tokenizer

OPENINGS = (
    "The history of the city begins",
    "Question: How does a bicycle stay upright?\nAnswer:",
    "def read_table(path):\n",
    "Once upon a time there was",
    "Dear Sir or Madam,\n",
    "In the experiment we measured",
    "The recipe is simple. First,",
    "The president of the country said on Monday that",
    "She opened the door and",
    "To install the program,",
    "There are three reasons why",
    "The species is found in",
    "1. Introduction\n",
    "The film was released in",
    "My advice is to",
    "A triangle has sides of length",
)

Tick = Callable[[str, float], None]


def generate(
    model: _core.Model,
    tokenizer: Tokenizer,
    *,
    chunks: int,
    ctx: int,
    seed: int,
    temperature: float = 0.8,
    tick: Tick | None = None,
) -> NDArray[np.int32]:
    """Tokens [chunks, ctx] that the model made from OPENINGS; where it ends a text, the next opening follows.

    tick: called with a line for people and the number of tokens made since the last call."""
    import numpy as np

    from ... import _core

    ends = set(tokenizer.eos_ids)
    openings = [tokenizer.encode(text, add_bos=False, parse_special=False) for text in OPENINGS]
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    out = np.zeros((chunks, ctx), dtype=np.int32)
    session = _core.Session(model, ctx)
    used = seed
    for c in range(chunks):
        sampler = _core.Sampler(temperature=temperature, seed=seed * 1_000_003 + c)
        session.truncate(0)

        def read(ids: Sequence[int]) -> None:
            room = ctx - session.n_past
            session.eval(np.asarray(ids[:room], dtype=np.int32))

        read([*bos, *openings[used % len(openings)]])
        used += 1
        made = session.n_past
        while session.n_past < ctx:
            token = session.step(sampler)
            if token in ends and session.n_past < ctx:
                read(openings[used % len(openings)])
                used += 1
            if tick is not None and session.n_past - made >= 32:
                tick(
                    f"text of the model's own, {c * ctx + session.n_past} of {chunks * ctx} tokens",
                    session.n_past - made,
                )
                made = session.n_past
        out[c] = session.tokens
        if tick is not None:
            tick("text of the model's own", ctx - made)
    return out


def cut(tokenizer: Tokenizer, text: str, *, ctx: int, wanted: int, least: int) -> NDArray[np.int32]:
    """Up to `wanted` chunks [n, ctx], spread evenly over a text, each beginning with BOS where the model asks for it.

    Raises UsageError where the text has fewer than `least` chunks."""
    import numpy as np

    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    body = ctx - len(bos)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    pieces: list[list[int]] = []
    ids = np.zeros(0, dtype=np.int32)
    # Long files are sampled in as many places as chunks are wanted, so that no more is tokenized than is used.
    span = body * 16
    if len(text) > 2 * span * wanted:
        for i in range(wanted):
            at = text.find(" ", i * (len(text) // wanted)) + 1
            piece = tokenizer.encode(text[at : at + span], add_bos=False, parse_special=False)[:body]
            if len(piece) == body:
                pieces.append(piece)
    else:
        ids = np.asarray(tokenizer.encode(text, add_bos=False, parse_special=False), dtype=np.int32)
        have = len(ids) // body
        picks = sorted({round(i * (have - 1) / max(1, wanted - 1)) for i in range(wanted)}) if have else []
        pieces = [ids[i * body : (i + 1) * body].tolist() for i in picks]
    if len(pieces) < least:
        raise UsageError(
            f"the text is too short to calibrate with: {len(ids)} tokens, but at least {least * body} are needed; "
            "give a longer one, or none"
        )
    return np.asarray([[*bos, *piece] for piece in pieces], dtype=np.int32)


def corpus_hash(*parts: NDArray[np.int32]) -> str:
    """sha256 over the tokens."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(str(part.shape).encode())
        digest.update(part.astype("<i4").tobytes())
    return digest.hexdigest()
