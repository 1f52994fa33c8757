"""How a run is stopped from outside: Ctrl-C, SIGTERM, a time limit. It saves, says how to continue, and ends."""

import contextlib
import signal
import threading

TIME_IS_OVER = 14  # among the signals: the number of SIGALRM, though none is sent; Windows has none
_received = []


def received():
    """The number of the first signal that came within graceful_stop; 0: none did."""
    return _received[0] if _received else 0


def end_if_received():
    """Ends what has saved itself: SystemExit(128 + the signal's number), if one came."""
    if received():
        raise SystemExit(128 + received())


@contextlib.contextmanager
def graceful_stop(how_to_resume, time_limit=None):
    """Within it, a first Ctrl-C or SIGTERM (a preempted job) is only noted in received(); a second one ends the program.

    After time_limit seconds TIME_IS_OVER is noted. SystemExit(128 + number) then passes through here, which says how to
    resume. A time limit is no failure: status 0.
    """

    def on_signal(number, frame):
        signal.signal(number, before[number])
        _received.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    clock = threading.Timer(time_limit or 0, _received.append, [TIME_IS_OVER])
    clock.daemon = True  # a program that fails does not wait for it
    if time_limit is not None:
        clock.start()
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.code, int):  # words of its own
            raise
        print(f"\nstopped and saved; {how_to_resume}")
        raise SystemExit(0 if stop.code == 128 + TIME_IS_OVER else stop.code) from None
    finally:
        clock.cancel()
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
