"""The two exceptions that end a command with one line instead of a traceback, and warnings."""

import errno
import signal
import sys
from contextlib import suppress

HINTS = {**dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "is the disk full?"),
         **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "is the folder read-only?"),
         errno.ENOENT: "is the folder gone?"}


class UserError(Exception):
    """A mistake that the user can correct: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Interrupted(Exception):
    """A signal arrived and the work stopped cleanly; `status` is the exit status for that signal."""

    def __init__(self, signal_number: int, message: str = "stopped") -> None:
        super().__init__(f"{signal.Signals(signal_number).name}: {message}")
        self.status = 128 + signal_number


def reason(error: OSError) -> str:
    """The system's words for what failed, with a hint where there is one."""
    words = error.strerror or str(error) or type(error).__name__
    return f"{words}: {HINTS[error.errno]}" if error.errno in HINTS else words


def warn(message: str) -> None:
    """Print one line on stderr about something that does not stop the command."""
    say_on_stderr(f"warning: {message}")


def say_on_stderr(message: str) -> None:
    """Print one line on stderr at once. A stderr that is gone or full changes nothing, not even the exit status."""
    with suppress(OSError):
        sys.stderr.write(f"{' '.join(message.split())}\n")  # one write: other processes write there too
        sys.stderr.flush()
