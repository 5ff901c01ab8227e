"""Tokens to text as they come: whole characters only, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

from pipesim.errors import BadInputError

_PATIENCE = 8  # tokens that may wait for the rest of a character: one has four bytes at most, special tokens none


class TextStream:
    """Turns tokens into text as they come, never showing half a character: ``feed``, ``feed``, ..., ``finish``.

    The text ends before the ``stop`` string that is complete first, and with it the stream: ``ended`` is then the
    number of tokens up to the one that completed it, else None. What may yet become a stop string is not shown.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        if not all(stop):
            raise BadInputError("stop: an empty string would end every text, leave it out")
        self.ended: int | None = None
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens = 0
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        # Decoders may join tokens with what stands before, so the last shown tokens stay in front as context.
        self._context: list[int] = []
        self._waiting: list[int] = []

    def feed(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete, however they are cut; incomplete characters wait for the next tokens.

        What still looks incomplete after more than 8 tokens is none, but U+FFFD or bytes that are no text.
        """
        shown = []
        for token in ids:  # one at a time: the same text, however runs group them
            if self.ended is None:
                self._tokens += 1
                shown.append(self._watch(self._add(token)))
        return "".join(shown)

    def _watch(self, piece: str, is_last: bool = False) -> str:
        """Ends the stream at a stop string; else what can no longer become part of one."""
        text = self._held + piece
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stop if stop in text]
        if found:
            self.ended, self._held = self._tokens, ""
            return text[: min(found)[1]]
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        held = 0 if is_last else next((n for n in range(longest, 0, -1) if self._begins_a_stop(text, n)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _begins_a_stop(self, text: str, length: int) -> bool:
        return length <= len(text) and any(stop.startswith(text[-length:]) for stop in self._stop)

    def _add(self, token: int) -> str:
        self._waiting.append(token)
        piece = self._piece()
        if piece and not piece.endswith("\ufffd"):
            return self._show(piece, len(self._waiting))
        if len(self._waiting) <= _PATIENCE:
            return ""
        # only the last character can still change: the longest part that ends before it is shown
        for cut in range(len(self._waiting) - 1, 0, -1):
            beginning = self._piece(cut)
            if beginning and piece[:-1].startswith(beginning):
                return self._show(beginning, cut)
        return self._show(piece, len(self._waiting))

    def _show(self, piece: str, tokens: int) -> str:
        if piece:
            self._context = self._waiting[:tokens]
        self._waiting = self._waiting[tokens:]
        return piece

    def finish(self) -> str:
        """Whatever still waits, an unfinished character as U+FFFD."""
        piece = self._piece() if self.ended is None else ""
        self._context, self._waiting = [], []
        return self._watch(piece, is_last=True)

    def _piece(self, tokens: int | None = None) -> str:
        """What the first ``tokens`` that wait (None: all) add to the text."""
        shown = self._decode(self._context)
        return self._decode(self._context + self._waiting[:tokens])[len(shown) :]
