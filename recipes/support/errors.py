"""The errors that a recipe shows without a traceback."""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Callable
from typing import NoReturn

from hf_padam.files import WriteError
from hf_padam.optim.hyperparameters import UnfitWeightsError
from hf_padam.resuming.checkpoints import CheckpointError


class UsageError(Exception):
    """Something the user gave cannot be used: the message says what, what is allowed, and what to do."""

    exit_status = 2


class RunFailed(Exception):
    """A run that a recipe started ended without results: the message says why, and where its output is."""


def suggest(name: str, known: set[str], prefix: str = "") -> str:
    """End a message on an unknown name by the known one that may have been meant, if one is like it."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def needs_extra(error: ImportError) -> NoReturn:
    """End a recipe, as it is imported, of which a package of the extra "trl" is missing."""
    print(f'error: {error}; this recipe needs pip install -c constraints.txt -e ".[recipes,trl]"', file=sys.stderr)
    sys.exit(UsageError.exit_status)


def reports_usage_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's main so that errors with a message for the user end it with that alone.

    The exit status is 2 for what cannot be used, 1 where a run fails on its way: a full disk, gradients that are not
    finite.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except (UsageError, UnfitWeightsError) as error:  # the latter is known when training begins
            print(f"error: {error}", file=sys.stderr)
            sys.exit(UsageError.exit_status)
        except (CheckpointError, WriteError, FloatingPointError, RunFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    return wrapped
