"""The text of a completion as it grows: stop strings, and the part that can be shown already."""

from collections.abc import Callable, Sequence

from moi_jax.sampling.requests import Completion, Finish, Request

# Decoding gives this for bytes that are no character, or not a complete one yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The completion of one request, built up from its tokens."""

    def __init__(
        self,
        request: Request,
        decode: Callable[[Sequence[int]], str],
        on_text: Callable[[str], None] | None,
    ):
        """
        Args:
          decode: ids -> text.
          on_text: called with new text as soon as no later token can change it.
        """
        self.tokens: list[int] = []
        self._stops = tuple(stop for stop in request.stop_strings if stop)
        self._decode, self._on_text = decode, on_text
        self._shown = ""

    def add(self, tokens: Sequence[int]) -> bool:
        """Adds tokens; returns whether they complete a stop string, and drops those after it."""
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
        self._show(self._stable(text))
        return False

    def complete(self, finish: Finish) -> Completion:
        """The completion, after the last token; shows the rest of its text."""
        text = self._decode(self.tokens) if self.tokens else ""
        ends = [text.find(stop) for stop in self._stops if stop in text]
        text = text[: min(ends)] if ends else text
        self._show(text)
        return Completion(tuple(self.tokens), text, finish)

    def _stable(self, text: str) -> str:
        """The text without an end that may still become another character or a stop string."""
        text = text.rstrip(_REPLACEMENT)
        partial = [
            size
            for stop in self._stops
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        return text[: len(text) - max(partial, default=0)]

    def _show(self, text: str) -> None:
        if self._on_text and len(text) > len(self._shown):
            self._on_text(text[len(self._shown) :])
            self._shown = text
