"""The line of all visitors' work: one turn at a time, the others wait and can be taken out.

The page's own line, not Gradio's: it counts the work that runs among what is before a visitor, and it lets
a visitor's Stop take out what waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

from kcv2diffusers.errors import Error

_MOST = 21  # turns in the line: one at work, twenty that wait


@dataclass(eq=False)
class Turn:
    """A place in the line: work that a `visitor` began on a `tab`. `stopped` work is not begun."""

    visitor: object
    tab: str
    stopped: bool = False


class Line:
    """Turns in the order of their begin; the first one is at work."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._changed = Condition()

    @contextmanager
    def join(self, visitor: object, tab: str) -> Iterator[Turn]:
        """A place at the end of the line until the block ends. Raises Error if the line is too long."""
        turn = Turn(visitor, tab)
        with self._changed:
            if len(self._turns) >= _MOST:
                raise Error(f"{_MOST - 1} commands wait already. Try again later.")
            self._turns.append(turn)
        try:
            yield turn
        finally:
            self._leave([turn])

    def wait(self, turn: Turn) -> Iterator[int]:
        """How many turns are before this one, at each change, until it is the first or is stopped."""
        told = 0
        while (before := self._changed_from(told, turn)) > 0:
            yield (told := before)

    def stop(self, visitor: object, tab: str | None = None) -> None:
        """Mark the visitor's turns as stopped, all or those of one tab."""
        with self._changed:
            for turn in self._turns:
                if turn.visitor is visitor and tab in (None, turn.tab):
                    turn.stopped = True
            self._changed.notify_all()

    def forget(self, visitor: object) -> None:
        """Take a visitor who has left out of the line, whether the visitor's work notices or not."""
        self.stop(visitor)
        with self._changed:
            theirs = [turn for turn in self._turns if turn.visitor is visitor]
        self._leave(theirs)

    def holds(self, visitor: object) -> bool:
        """Whether something of the visitor waits or is at work."""
        with self._changed:
            return any(turn.visitor is visitor for turn in self._turns)

    def _changed_from(self, told: int, turn: Turn) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._before(turn) != told)
            return self._before(turn)

    def _before(self, turn: Turn) -> int:
        """How many turns are before this one; -1 if it need not wait any longer."""
        if turn.stopped or turn not in self._turns:
            return -1
        return self._turns.index(turn) or -1

    def _leave(self, turns: list[Turn]) -> None:
        with self._changed:
            self._turns = [each for each in self._turns if each not in turns]
            self._changed.notify_all()
