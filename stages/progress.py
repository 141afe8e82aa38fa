"""How a stage tells what it is doing, without knowing whether anybody looks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Handed down by whoever runs a stage."""

    def begin(self, task: str, total: int, done: int = 0) -> None:
        """A new task of `total` items, `done` of which were finished by an earlier run."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more items are done; `note` is a short text beside the bar."""

    def say(self, text: str) -> None:
        """One line that stays."""


class Silent:
    """Tells nobody."""

    def begin(self, task: str, total: int, done: int = 0) -> None:
        """Nothing to show."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Nothing to show."""

    def say(self, text: str) -> None:
        """Nothing to show."""
