"""How a run is stopped from outside: Ctrl-C, SIGTERM, a time limit. It saves, says how to continue, and ends."""

import contextlib
import signal
import threading

TIME_IS_OVER = 14  # in the list of signals: the number of SIGALRM, though none is sent; Windows has none
_stops = []  # the list of signals of the graceful_stop that is entered, if one is


@contextlib.contextmanager
def graceful_stop(time_limit=None):
    """Within it, a first Ctrl-C or SIGTERM (a preempted job) only fills the list that it yields; a second one ends the program.

    After time_limit seconds TIME_IS_OVER comes into the list. One within another yields the list of the outer one: what
    comes between two inner ones stops the next.
    """
    if _stops:
        yield _stops[0]
        return
    received = []

    def on_signal(number, frame):
        signal.signal(number, before[number])
        received.append(number)

    clock = threading.Timer(time_limit or 0, received.append, [TIME_IS_OVER])
    clock.daemon = True  # a program that fails does not wait for it
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    _stops.append(received)
    if time_limit is not None:
        clock.start()
    try:
        yield received
    finally:
        clock.cancel()
        _stops.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def received():
    """The signals that came within the graceful_stop that is entered; outside of one, none."""
    return _stops[0] if _stops else []


@contextlib.contextmanager
def told(how_to_resume):
    """Around what ends by SystemExit(128 + number) after a stop: prints how to continue. A time limit is no failure: status 0."""
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.code, int):  # words of its own
            raise
        print(f"\nstopped and saved; {how_to_resume}")
        raise SystemExit(0 if stop.code == 128 + TIME_IS_OVER else stop.code) from None
