"""The text of a row as it is written; incomplete characters are held back, and what may be the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from components.contracts import SamplingParams
from components.data.tokenizers import StreamDecoder, Tokenizer


def needs_text(params: SamplingParams) -> bool:
    """Whether a row must be looked at beyond its ids while it is written; of all others the text is made once, at the end."""
    return bool(params.stop) or params.constraint is not None


class TextStream:
    """Turns the ids of one row into text, up to the first stop string.

    The first is the one that is complete at the earliest character, and of several that end there the longest; how the text is split into
    tokens makes no difference. Special tokens have no text.

    Args: stop: stop strings, none of them empty.

    Example:
        >>> from components.data.tokenizers import bytes_tokenizer
        >>> stream = TextStream(bytes_tokenizer(), ("END",))
        >>> [stream.push(byte) for byte in b"aE!END."]
        ['a', '', 'E!', '', '', '', '']
        >>> stream.text, stream.stopped, stream.tokens
        ('aE!', 'END', 6)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self._pieces: list[str] = []
        self.stopped: str | None = None  # the stop string that was found
        self.tokens = 0  # ids up to the one that completed it, or all so far

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Return the text that can be shown now that `token_id` is there; "" after a stop string."""
        if self.stopped is not None:
            return ""
        self.tokens += 1
        return self._show(self._decoder.push(token_id))

    def extend(self, ids: Iterable[int]) -> str:
        """As `push`, for several ids; those after the one that completes a stop string are not read."""
        return "".join(map(self.push, ids))

    def flush(self) -> str:
        """The end of the row: return what was held back, incomplete bytes as U+FFFD. "" after a stop string."""
        if self.stopped is not None:
            return ""
        return self._show(self._decoder.flush(), final=True)

    def _show(self, new: str, final: bool = False) -> str:
        text, self._held = self._held + new, ""
        found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, length, self.stopped = min(found)
            text = text[: end + length]
        elif not final and self._stop:
            kept = self._beginning(text)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        if text:
            self._pieces.append(text)
        return text

    def _beginning(self, text: str) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        for kept in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-kept:]) for stop in self._stop):
                return kept
        return 0
