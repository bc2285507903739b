"""Progress: lines in a pipe, a bar on a terminal, and neither where nobody asked for them."""

import io
import logging
import os
import pty

import pytest

from rrhf import progress
from rrhf.progress import Progress, duration, figures, pulse, tracked


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    now = [100.0]
    monkeypatch.setattr(progress, "_now", lambda: now[0])
    monkeypatch.setattr(progress, "_last_line", None)
    return now


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "rrhf.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_comes_every_few_seconds_with_rate_and_time_left(clock, lines):
    with Progress("train", 400, "step") as work:
        for _ in range(30):
            clock[0] += 0.5
            work.advance(figures="loss 1.5")
    assert lines() == [
        "train: 10 of 400 steps, loss 1.5, 2 steps/s, 3 min 15 s left",
        "train: 20 of 400 steps, loss 1.5, 2 steps/s, 3 min 10 s left",
        "train: 30 of 400 steps, loss 1.5, 2 steps/s, 3 min 05 s left",
    ]


def test_the_rate_is_of_this_process_alone_and_slow_work_is_told_by_the_item(clock, lines):
    with Progress("score", 120, "prompt", done=100) as work:
        clock[0] += 20
        work.advance(2)
    assert lines() == ["score: 102 of 120 prompts, 10 s a prompt, 3 min 00 s left"]


def test_short_work_is_silent_and_the_last_item_has_no_time_left(clock, lines):
    with Progress("score", 2, "prompt") as work:
        clock[0] += 4.9
        work.advance()
        assert lines() == []
        clock[0] += 4.9
        work.advance()
    assert lines() == ["score: 2 of 2 prompts, 4.9 s a prompt"]


def test_what_goes_on_inside_an_item_is_told_too(clock, lines):
    pulse("nobody works")
    with Progress("train", 40, "step") as work:
        for written in range(1, 5):
            clock[0] += 3
            pulse(f"{written} of 4 responses written")
        work.advance()
        clock[0] += 1
        pulse("one second later")
    pulse("nobody works any more")
    assert lines() == [
        "train: 0 of 40 steps, 2 of 4 responses written",
        "train: 0 of 40 steps, 4 of 4 responses written",
    ]


def test_work_within_work_is_told_at_one_pace(clock, lines):
    with Progress("train", 4, "step") as outer:
        for _ in range(2):
            for _ in tracked(range(3), "evaluate", "prompt"):
                clock[0] += 2
            outer.advance()
    assert lines() == [
        "evaluate: 3 of 3 prompts, 2 s a prompt",
        "evaluate: 3 of 3 prompts, 2 s a prompt",
    ]


def test_many_short_pieces_of_work_are_not_silent(clock, lines):
    for number in range(4):
        with Progress(f"part {number}", 1, "step") as work:
            clock[0] += 3
            work.advance()
    assert lines() == ["part 1: 1 of 1 steps, 3 s a step", "part 3: 1 of 1 steps, 3 s a step"]


def test_an_error_ends_the_work(clock, lines):
    with pytest.raises(ValueError, match="broken"), Progress("train", 4, "step"):
        raise ValueError("broken")
    clock[0] += 60
    pulse("nobody works")
    assert lines() == []


def test_without_the_command_line_nothing_is_written(clock, capsys):
    with Progress("train", 4, "step") as work:
        clock[0] += 60
        work.advance()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_instead_of_lines(clock, lines, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    with Progress("train", 4, "step", done=1) as work:
        clock[0] += 60
        work.total = 3
        work.advance(figures="loss 2.5")
        pulse("a detail")
    assert lines() == []
    assert "train" in screen.getvalue() and "2/3" in screen.getvalue()
    assert "loss 2.5" in screen.getvalue()


def test_a_terminal_without_a_size_gets_lines(clock, lines, monkeypatch):
    leader, follower = pty.openpty()  # of zero rows
    with os.fdopen(leader), os.fdopen(follower, "w") as screen:
        monkeypatch.setattr("sys.stderr", screen)
        with Progress("train", 4, "step") as work:
            clock[0] += 60
            work.advance()
    assert lines() == ["train: 1 of 4 steps, 60 s a step, 3 min 00 s left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (7512, "2 h 05 min"),
    ],
)
def test_durations_are_for_a_reader(seconds, text):
    assert duration(seconds) == text


def test_figures_come_in_the_order_of_their_forms():
    values = {"rate": 1234.5, "loss": 12345.6, "other": 1.0}
    forms = {"loss": "loss {:.4g}", "score": "score {:.3f}", "rate": "{:.0f} tokens/s"}
    assert figures(values, forms) == "loss 1.235e+04, 1234 tokens/s"
