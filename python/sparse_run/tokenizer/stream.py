"""Token ids to text, piece by piece: never half a character, never a replaced byte that a later token completes."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class TokenStream:
    """Turns ids into text as they come. The pieces joined are the text of all ids.

    >>> stream = tokenizer.stream()  # doctest: +SKIP
    >>> "".join(stream.push(i) for i in ids) + stream.finish()  # doctest: +SKIP
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, strip_space: bool = False) -> None:
        """`strip_space` drops one space before the first character: what a SentencePiece tokenizer put there."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that is certain after one more token; may be empty."""
        data = self._tokenizer.token_bytes(token, skip_special=self._skip_special)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left: U+FFFD where the ids end within a character."""
        return self._decoder.decode(b"", True)
