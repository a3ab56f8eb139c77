"""What the engine tells about its work, step by step; metrics implement it."""

from typing import Protocol


class StepObserver(Protocol):
    """Is called on engine threads, about twice a step: it must be cheap and must not raise."""

    def encoded(self, seconds: float, sentences: int, source_tokens: int, padded_tokens: int) -> None:
        """An encoder call has ended; `padded_tokens` of its attention rectangle held no source token."""
        ...

    def stepped(self, seconds: float, rows: int, sentences: int) -> None:
        """A decode step of so many has ended, host work included."""
        ...

    def released(self, steps: int) -> None:
        """A cancelled or late request has given its rows back: so many steps after it was cancelled or late."""
        ...


class NullObserver:
    """Watches nothing."""

    def encoded(self, seconds: float, sentences: int, source_tokens: int, padded_tokens: int) -> None:
        """Nothing."""

    def stepped(self, seconds: float, rows: int, sentences: int) -> None:
        """Nothing."""

    def released(self, steps: int) -> None:
        """Nothing."""
