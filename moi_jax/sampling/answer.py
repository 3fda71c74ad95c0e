"""The text of an answer as it grows: stop strings, and what may be shown of it already."""

from collections.abc import Callable, Sequence

from moi_jax.sampling.requests import Completion, Finish, Request

# What decoding gives for bytes that are no character, or not yet a whole one.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Answer:
    """The answer to one request, fed with tokens."""

    def __init__(
        self,
        request: Request,
        decode: Callable[[Sequence[int]], str],
        on_text: Callable[[str], None] | None,
    ):
        """`on_text` is told new text as soon as no token can change it any more."""
        self.tokens: list[int] = []
        self._stops = tuple(stop for stop in request.stop_strings if stop)
        self._decode, self._on_text = decode, on_text
        self._shown = ""

    def add(self, tokens: Sequence[int]) -> bool:
        """Whether a stop string is whole now; the tokens after it are not taken then."""
        before = len(self.tokens)
        self.tokens += tokens
        if not tokens or not (self._stops or self._on_text):
            return False
        text = self._decode(self.tokens)
        if any(stop in text for stop in self._stops):
            for count in range(before + 1, len(self.tokens) + 1):
                if any(stop in self._decode(self.tokens[:count]) for stop in self._stops):
                    del self.tokens[count:]
                    return True
        self._show(self._certain(text))
        return False

    def finished(self, finish: Finish) -> Completion:
        text = self._decode(self.tokens) if self.tokens else ""
        ends = [text.find(stop) for stop in self._stops if stop in text]
        text = text[: min(ends)] if ends else text
        self._show(text)
        return Completion(tuple(self.tokens), text, finish)

    def _certain(self, text: str) -> str:
        """Without the end that may yet become another character or a stop string."""
        text = text.rstrip(_REPLACEMENT)
        begun = [
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        return text[: len(text) - max(begun, default=0)]

    def _show(self, text: str) -> None:
        if self._on_text and len(text) > len(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
