"""The two exceptions that end a command with one line instead of a traceback, and warnings."""

import signal
import sys


class UserError(Exception):
    """A mistake that the user can correct: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Interrupted(Exception):
    """A signal arrived and the work stopped cleanly; `status` is the exit status for that signal."""

    def __init__(self, signal_number: int, message: str = "stopped") -> None:
        super().__init__(f"{signal.Signals(signal_number).name}: {message}")
        self.status = 128 + signal_number


def warn(message: str) -> None:
    """Print one line on stderr about something that does not stop the command."""
    print("warning: " + " ".join(message.split()), file=sys.stderr, flush=True)
