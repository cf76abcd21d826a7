"""The one error that a recipe shows without a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UsageError(Exception):
    """Something the user gave cannot be used: the message says what, what is allowed, and what to do."""


def reports_usage_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a script's main so that a `UsageError` ends it with its message alone and exit status 2."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
