"""The line of visitors' work: who waits for whom, and who is taken out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import Queue
from threading import Thread

import pytest
from support.waiting import LONG

from kcv2diffusers import Error
from kcv2diffusers.app.line import Line, Turn

ONE, OTHER = "one", "other"


@contextmanager
def waiter(line: Line, turn: Turn) -> Iterator[Queue[int | str]]:
    """What the line tells a turn that waits in a thread of its own; "end" when it waits no longer."""
    told: Queue[int | str] = Queue()

    def wait() -> None:
        for before in line.wait(turn):
            told.put(before)
        told.put("end")

    thread = Thread(target=wait)
    thread.start()
    yield told
    thread.join(LONG)
    assert not thread.is_alive()


def test_the_first_does_not_wait() -> None:
    line = Line()
    with line.join(ONE, "a") as turn:
        assert list(line.wait(turn)) == []
    with line.join(OTHER, "a") as turn:
        assert list(line.wait(turn)) == [], "nothing is left of the first"


def test_turns_go_one_after_the_other() -> None:
    line = Line()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(line.join(ONE, "a"))
        second.enter_context(line.join(OTHER, "a"))
        with line.join(ONE, "b") as third, waiter(line, third) as told:
            assert told.get(timeout=LONG) == 2
            second.close()
            assert told.get(timeout=LONG) == 1
            first.close()
            assert told.get(timeout=LONG) == "end" and not third.stopped


def test_a_stopped_turn_waits_no_longer() -> None:
    line = Line()
    with line.join(ONE, "a") as first, line.join(ONE, "b") as second, line.join(OTHER, "b") as third:
        with waiter(line, second) as told:
            assert told.get(timeout=LONG) == 1
            line.stop(ONE, "b")
            assert told.get(timeout=LONG) == "end"
        assert [turn.stopped for turn in (first, second, third)] == [False, True, False]
        line.stop(ONE)
        assert first.stopped and not third.stopped


def test_a_visitor_who_left_holds_nobody_up() -> None:
    line = Line()
    with line.join(ONE, "a") as gone, line.join(OTHER, "a") as turn, waiter(line, turn) as told:
        assert told.get(timeout=LONG) == 1 and line.holds(ONE)
        line.forget(ONE)
        assert told.get(timeout=LONG) == "end"
        assert gone.stopped and not turn.stopped and not line.holds(ONE)


def test_a_long_line_takes_no_more() -> None:
    line = Line()
    with ExitStack() as stack:
        for _ in range(21):
            stack.enter_context(line.join(ONE, "a"))
        with pytest.raises(Error, match="20 commands wait already"), line.join(OTHER, "a"):
            pass
    with line.join(OTHER, "a"):
        pass
