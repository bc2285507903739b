"""A signal as a wish to stop: remembered, honoured at safe places, handlers put back."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from rrhf.errors import EXIT_STOPPED_BY_SIGINT, EXIT_STOPPED_BY_SIGTERM, StoppedBySignal
from rrhf.signals import (
    _native_handler,
    _set_native_handler,
    caught_signals,
    sigterm_interrupts,
)

BOTH = pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, EXIT_STOPPED_BY_SIGTERM), (signal.SIGINT, EXIT_STOPPED_BY_SIGINT)],
)


@BOTH
def test_a_signal_is_remembered_until_a_safe_place(number, code):
    with caught_signals() as stop:
        stop.raise_if_received("nothing")
        signal.raise_signal(number)
        done = "this still runs"
        with pytest.raises(StoppedBySignal, match="7 rows are on disk") as caught:
            stop.raise_if_received("7 rows are on disk")
    assert caught.value.exit_code == code and done
    assert number.name in str(caught.value)


@BOTH
def test_work_that_may_be_dropped_is_left_at_once(number, code):
    reached = []

    def work() -> None:
        try:
            signal.raise_signal(number)
            reached.append("after the signal")
        except Exception:
            reached.append("taken for an error")

    with caught_signals() as stop, pytest.raises(StoppedBySignal) as caught:
        stop.run(work, "nothing is lost")
    assert caught.value.exit_code == code
    assert reached == []


def test_a_signal_from_before_keeps_work_from_beginning():
    begun = []
    with caught_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedBySignal):
            stop.run(lambda: begun.append(1), "nothing is lost")
    assert begun == []


def test_work_gives_back_what_it_made_and_its_errors():
    with caught_signals() as stop:
        assert stop.run(lambda: 7, "") == 7
        with pytest.raises(KeyError):
            stop.run(lambda: {}["x"], "")
        signal.raise_signal(signal.SIGTERM)  # not within work any more: only remembered
        assert stop.received == signal.SIGTERM


def test_handlers_are_put_back_and_a_second_signal_is_not_held():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with caught_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM and came == []
            signal.raise_signal(signal.SIGTERM)
            assert came == [signal.SIGTERM], "the second reaches who was there before"
        signal.raise_signal(signal.SIGTERM)
        assert len(came) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_nothing_is_caught():
    seen = []

    def work() -> None:
        with caught_signals() as stop:
            seen.append(stop.run(lambda: 3, ""))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [3] and signal.getsignal(signal.SIGTERM) == before


def test_handlers_are_put_back_where_no_signal_came():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with caught_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture
def native() -> Iterator[int]:
    """A handler in C for SIGTERM, of which Python knows that it is none of its own."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler = kind(lambda number: None)
    address = ctypes.cast(handler, ctypes.c_void_p).value
    assert address is not None
    before = signal.getsignal(signal.SIGTERM)
    _set_native_handler(signal.SIGTERM, address)
    yield address
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("catching", [caught_signals, sigterm_interrupts])
def test_a_handler_in_c_is_put_back(
    catching: Any, native: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = signal.getsignal
    monkeypatch.setattr(
        signal, "getsignal", lambda number: None if number == signal.SIGTERM else known(number)
    )
    with catching():
        assert _native_handler(signal.SIGTERM) != native
    assert _native_handler(signal.SIGTERM) == native


def test_a_second_signal_goes_to_a_handler_in_c(
    native: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = signal.getsignal
    monkeypatch.setattr(
        signal, "getsignal", lambda number: None if number == signal.SIGTERM else known(number)
    )
    with caught_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert _native_handler(signal.SIGTERM) == native
