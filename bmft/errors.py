"""Mistakes of the user: one line that says what is wrong, where, and the nearest right thing."""

import argparse
import difflib
import os
import signal
import sys
import threading


class Mistake(Exception):
    """Something the user can mend. Its text is one line and ends the program with status 2."""


class Stopped(BaseException):
    """SIGTERM: what was learnt is saved, and the same command continues. Ends with status 75.

    Like KeyboardInterrupt it is no `Exception`: no library may take it for a fault of its own.
    """


class Parser(argparse.ArgumentParser):
    """Its complaints are Mistakes."""

    def error(self, message):
        raise Mistake(f"{message}; see --help")


def nearest(word, known):
    """What to say about an unknown `word`: the closest of `known`, or all of them."""
    known = sorted(map(str, known))
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + (", ".join(known) if known else "none")


def command(main, argv=None):
    """Run `main(argv)` as a program: a `Mistake` becomes one line on stderr and status 2.

    Returns main's own status (None counts as 0). `BMFT_TRACEBACK=1` shows where it was raised.
    SIGTERM raises `Stopped`, status 75, wherever nothing handles it better (the loop does).
    """
    restore = on_sigterm(_stop)
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except Mistake as mistake:
        if os.environ.get("BMFT_TRACEBACK") == "1":
            raise
        print("error: " + " ".join(str(mistake).split()), file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return 75
    finally:
        restore()


def on_sigterm(handler):
    """Let `handler(signum, frame)` have SIGTERM; returns the function that undoes it.

    Python allows handlers in the main thread alone: elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    before = signal.signal(signal.SIGTERM, handler)
    return lambda: signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _stop(signum, frame):
    raise Stopped("SIGTERM came outside of training; run the same command again to continue")
