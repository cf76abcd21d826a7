"""The string `optim_args` of training arguments, which holds PAdam's options as ``key=value`` pairs."""

from __future__ import annotations

import re
from typing import Any

from .options import OPTIONS, accepted, read

_NEXT_KEY = re.compile(r',(?=\s*\w+\s*=)(?=(?:[^"]*"[^"]*")*[^"]*$)')
"""A comma between pairs: before the next key, and not within double quotes."""


def split_optim_args(text: Any) -> dict[str, str]:
    """Split an `optim_args` string, key=value pairs joined by commas, into its pairs.

    Spaces count within a value only. A comma ends a value where a key follows, and not within double quotes, so
    regular expressions and JSON can be given as they are; a value as a whole may be in double quotes.

    Raises:
        ValueError: If it is no such string, or gives a key twice.
    """
    if not isinstance(text, str):
        raise ValueError(malformed(text))
    pairs: dict[str, str] = {}
    for pair in _NEXT_KEY.split(text) if text.strip() else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier() or value.endswith(","):
            raise ValueError(malformed(text))
        if key in pairs:
            raise ValueError(f"optim_args={text!r} gives {key} twice. Drop one of them")
        pairs[key] = value[1:-1] if re.fullmatch('"[^"]*"', value) else value
    return pairs


def parse_optim_args(text: str | None) -> dict[str, Any]:
    """Turn an `optim_args` string into typed options; absent keys stay absent.

    Raises:
        ValueError: On a malformed pair, an unknown or repeated key, or a bad value, with the list of what is accepted.
    """
    options = {}
    keys = ", ".join(f"{key} ({accepted(key)})" for key in OPTIONS)
    for key, value in split_optim_args("" if text is None else text).items():
        if key not in OPTIONS:
            raise ValueError(f"optim_args has no key {key!r} for padam. Accepted: {keys}")
        try:
            options[key] = read(key, value)
        except ValueError as error:
            raise ValueError(f"optim_args: {error}. Accepted: {keys}") from None
    return options


def malformed(text: Any) -> str:
    """Say that an `optim_args` string is malformed."""
    return (
        f"optim_args={text!r} is malformed: it must be a string of key=value pairs joined by commas, "
        'for example "p_norm=0.8,lambda_p=0.5"'
    )
