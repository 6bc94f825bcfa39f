"""A long command ends at a safe point on the first signal and at once on a second Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from training.signals import STOPPING, signals_wait, stop_on_signal


@pytest.fixture
def hang_up() -> Iterator[None]:
    """Give HUP back what it had."""
    previous = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_asks_for_the_end_and_handlers_come_back(number: signal.Signals, hang_up: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.is_set()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    with stop_on_signal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # only Ctrl-C is impatience
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_hang_up_that_is_ignored_stays_ignored(hang_up: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.is_set()


def test_signals_that_wait_do_at_the_end_what_they_would_have_done() -> None:
    reached = []
    with stop_on_signal() as stop:
        before = signal.getsignal(signal.SIGINT)
        with signals_wait():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not stop.is_set()
        assert stop.wait(5.0)

        def struck() -> None:
            with signals_wait():
                signal.raise_signal(signal.SIGINT)
                reached.append("the end")

        with pytest.raises(KeyboardInterrupt):
            struck()
        assert reached and signal.getsignal(signal.SIGINT) == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOPPING)


def test_signals_wait_though_another_thread_takes_them() -> None:
    done, reached = threading.Event(), []
    thread = threading.Thread(target=done.wait)

    def struck() -> None:
        with signals_wait():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(done.wait(0.1))

    with stop_on_signal() as stop:
        thread.start()  # it blocks none of them
        stop.set()
        with pytest.raises(KeyboardInterrupt):
            struck()
    done.set()
    thread.join()
    assert reached
