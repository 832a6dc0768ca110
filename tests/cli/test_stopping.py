"""Signals: at once, or put off until there is something saved; ignored ones stay ignored."""

from __future__ import annotations

import signal
import threading

import pytest

from tf_kfacprune.cli.stopping import Stopped, stop_signals


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """Not ignored, as they are in what a shell runs in the background."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    yield
    for number in numbers:
        signal.signal(number, before[number])


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signal_stops_at_once_and_the_handler_is_put_back(name, status):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f"stopped by {name}") as stopped, stop_signals():
        signal.raise_signal(number)
    assert stopped.value.status == status
    assert signal.getsignal(number) == before


def test_first_signal_can_be_put_off_and_the_second_cannot(capsys):
    with stop_signals() as stopping:
        stopping.check()
        stopping.deferred = True
        signal.raise_signal(signal.SIGTERM)
        assert stopping.is_asked_for
        assert "SIGTERM: stops after this step" in capsys.readouterr().err
        with pytest.raises(Stopped) as stopped:
            stopping.check()
        assert stopped.value.number == signal.SIGTERM
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGINT)
        assert stopped.value.number == signal.SIGINT


def test_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
