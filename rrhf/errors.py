"""The exceptions that end a command, and its exit codes.

A user's mistake is a `UserError`: one message that names the place, the value and the fix; the
command prints it without a traceback and exits with `EXIT_USER_ERROR`. Any other uncaught exception
is a fault of the program and is printed with its traceback.
"""

from pathlib import Path

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED_BY_SIGTERM = 75
EXIT_STOPPED_BY_SIGINT = 130


class UserError(ValueError):
    """An error in the input, a flag or a setting that the user can fix; the message says how."""


class Resumable(UserError):
    """An error between training steps, raised on all ranks; a checkpoint is written first."""


class AlreadyFinished(Exception):
    """Raised when a run that is to be resumed is already complete; nothing was changed.

    Attributes:
        folder: the folder of the run's model.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(f"the run is already complete; its model is in {folder}")
        self.folder = folder


class NonFiniteError(RuntimeError):
    """A loss, a gradient or a weight became NaN or infinite; the faulty value was not saved."""


class LostRank(Exception):
    """Raised when another process no longer answers."""


class StoppedBySignal(Exception):
    """Raised at a safe place after SIGTERM or SIGINT, once everything worth keeping is on disk."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NothingSent(Exception):
    """Raised by a dry run before it would send anything; the message says what it would send."""
