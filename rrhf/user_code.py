"""Imports and runs the user's own code, and turns its errors into one-line messages.

Modules are also found in the working directory. Calling `sys.exit` counts as an error.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rrhf.errors import StoppedBySignal, UserError
from rrhf.signals import Interrupted

NOT_ITS_OWN = (KeyboardInterrupt, Interrupted, StoppedBySignal, UserError)
"""Exceptions that may be raised while a user's code runs, but that are not a fault of the code."""


def imported(target: str, kind: str = "function") -> Any:
    """Import and return the object that "package.module:name" names.

    Args:
        target: the import path.
        kind: the kind of object that is expected, for messages.

    Raises:
        UserError: the path does not have that form, or there is no such module or name.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise UserError(f"{target!r}: name a {kind} as module:{kind}")
    what = f"{target}: the module {module_name!r}"
    with guarded(f"{what} cannot be imported: it"):
        try:
            found = getattr(importlib.import_module(module_name), attribute, None)
        except ImportError as error:
            raise UserError(
                f"{what} cannot be imported ({message_of(error)}); run the command in the module's "
                "folder, or install the module"
            ) from error
        except SystemExit as error:
            raise UserError(
                f"{what} called sys.exit({shown(error.code)}) while it was imported "
                f"({place_of(error)}); put what it does as a program below "
                '`if __name__ == "__main__":`'
            ) from error
    if found is None:
        raise UserError(f"{target}: {module_name} has no {kind} {attribute!r}")
    return found


def is_import_path(text: str) -> bool:
    """Whether a text has the form package.module:name."""
    module, _, name = text.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(target: str) -> Callable[..., Any]:
    """Import and return the function that "module:function" names.

    Raises:
        UserError: as for `imported`; or the object cannot be called.
    """
    function: Callable[..., Any] = imported(target)
    if not callable(function):
        raise UserError(
            f"{target}: {target.partition(':')[0]} has no function {target.partition(':')[2]!r}"
        )
    return function


def source_file(target: str) -> str | None:
    """Return the source file of a function, or else of its module; None if there is no such file.

    Args:
        target: "module:function".

    Raises:
        UserError: as for `load_function`.
    """
    function = load_function(target)
    try:
        found = inspect.getsourcefile(function)
    except (TypeError, OSError):  # a partial, an instance, a cached or a compiled function
        found = None
    file = found or getattr(sys.modules.get(target.partition(":")[0]), "__file__", None)
    return file if file and Path(file).is_file() else None


@contextmanager
def importable(folder: str) -> Iterator[None]:
    """Context manager: make the modules of a folder importable."""
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def guarded(what: str, cure: str = "fix it", folder: str | None = None) -> Iterator[None]:
    """Context manager: turn any exception of the user's code into one message.

    Args:
        what: the name of the code, for the message.
        cure: the fix, for the message.
        folder: the folder of the code's modules; None = the working directory.

    Raises:
        UserError: the code raised an exception or called `sys.exit`.
    """
    try:
        with importable(folder or str(Path.cwd())):
            yield
    except NOT_ITS_OWN:
        raise
    except SystemExit as error:
        raise UserError(
            f"{what} called sys.exit({shown(error.code)}) ({place_of(error)}); {cure}"
        ) from error
    except BaseException as error:
        raise UserError(f"{what} raised {describe_error(error)}; {cure}") from error


def shown(value: Any) -> str:
    """Format a value for a message, cut at 60 characters; safe even if its `__repr__` fails."""
    try:
        return f"{value!r:.60}"
    except Exception:  # also raised for an integer of thousands of digits
        kind = type(value).__name__
        return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind} that cannot be printed"


def describe_error(error: BaseException) -> str:
    """Describe an exception and the place where it was raised."""
    message = message_of(error)
    kind = type(error).__name__
    return f"{kind}{': ' if message else ''}{message} ({place_of(error)})"


def message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its message cannot be printed"


def place_of(error: BaseException) -> str:
    """Return file and line where an error was raised; for a syntax error, those of the
    faulty code."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    where = [frame for frame in frames if not frame.filename.startswith("<frozen")][-1]
    return f"{where.filename}, line {where.lineno}"
