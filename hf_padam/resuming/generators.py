"""The random generators that an object or a function holds: found, known by their first state, and set."""

from __future__ import annotations

import hashlib
import logging
import pickle
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from types import BuiltinMethodType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_DEPTH, _WIDTH = 12, 100  # how far, and through how large containers of data, generators are looked for
_NOT_SEARCHED = (torch.Tensor, torch.nn.Module, ModuleType, type, logging.Logger, str, int, float, bytes, type(None))
_SEARCHED = (*_GENERATORS, FunctionType, BuiltinMethodType, MethodType, GeneratorType, partial, dict, list, tuple)
# Of a built-in method, type checkers know no __self__.
_OF_ALL = (random.random.__self__, np.random.mtrand._rand, torch.default_generator)  # type: ignore[attr-defined]
_LIBRARIES = sys.stdlib_module_names | {"torch", "numpy", "transformers", "datasets", "accelerate", "hf_padam"}
"""Not searched for what functions use of them."""

_METHODS = ("__call__", "__getitem__", "__getitems__", "__iter__", "torch_call")


def owned(thing: Any, mapped: bool = False) -> Iterator[Any]:
    """Yield the random generators that an object or function holds, always in the same order; see `held`."""
    parts = held(thing, mapped=mapped)
    return (part for part in parts if isinstance(part, _GENERATORS) and all(part is not own for own in _OF_ALL))


def held(thing: Any, depth: int = _DEPTH, seen: dict[int, Any] | None = None, mapped: bool = False) -> Iterator[Any]:
    """Yield an object, and the objects that it holds.

    Generators of the datasets library's streams are left out: what they draw depends on their seed and the epoch as
    it is. So are, unless `mapped`, the functions that the streams map or are made from: when the library calls them is
    not known, and generators that are set in between were seen to draw what no second run repeats.
    """
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # and alive, for its id to stay its own
    yield thing
    streams = type(thing).__module__.startswith("datasets.iterable_dataset")
    left_out = _NOT_SEARCHED
    if streams:
        left_out = (*left_out, *_GENERATORS, *(() if mapped else (FunctionType, MethodType, partial)))
    for part in _parts(thing) if depth else ():
        if not isinstance(part, left_out):
            yield from held(part, depth - 1, seen, mapped)


def _parts(thing: Any) -> Iterable[Any]:
    if isinstance(thing, dict | list | tuple):
        parts = list(thing.values()) if isinstance(thing, dict) else thing
        return parts if len(parts) <= _WIDTH or isinstance(parts[0], (*_GENERATORS, Dataset)) else ()
    if isinstance(thing, partial):
        return (thing.func, thing.args, thing.keywords, vars(thing))
    if isinstance(thing, MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, BuiltinMethodType):
        return (thing.__self__,) if isinstance(thing.__self__, _GENERATORS) else ()
    if isinstance(thing, GeneratorType):
        return thing.gi_frame.f_locals.values() if thing.gi_frame is not None else ()
    if isinstance(thing, FunctionType):
        return _used(thing)
    slots, shared = _of_class(type(thing))  # type: ignore[arg-type]  # a class is hashable
    return [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots), *shared]


@cache
def _of_class(kind: type) -> tuple[list[str], list[Any]]:
    """Return the names of a class's slots, and its generators and methods."""
    slots, generators = [], []
    for table in map(vars, kind.__mro__[:-1]):
        names = table.get("__slots__", ())
        slots += [names] if isinstance(names, str) else list(names)
        generators += [value for value in table.values() if isinstance(value, _GENERATORS)]
    methods = [getattr(kind, name, None) for name in _METHODS]
    return slots, generators + [method for method in methods if isinstance(method, FunctionType)]


def _used(function: FunctionType) -> Iterable[Any]:
    """Return what a function uses: variables around it, defaults, attributes; what it names, but of libraries."""
    used = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            used.append(cell.cell_contents)
    if _is_of_library(function.__module__):
        return used
    names = _named(function.__code__)
    for value in [function.__globals__[name] for name in names if name in function.__globals__]:
        if isinstance(value, ModuleType):
            own = () if _is_of_library(value.__name__) else names
            used += [vars(value)[name] for name in own if name in vars(value)]
        elif isinstance(value, _SEARCHED) or not _is_of_library(type(value).__module__):
            used.append(value)
    return used


def _named(code: CodeType) -> list[str]:
    """Return the names of globals and attributes in a function's code, and in that of functions within it."""
    return [
        *code.co_names,
        *(name for inner in code.co_consts if isinstance(inner, CodeType) for name in _named(inner)),
    ]


def _is_of_library(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in _LIBRARIES


def first_state(generator: Any) -> str:
    """Return a hash of the state that a generator had when it was first seen: it stands for the user's own seed."""
    if id(generator) not in _first_states:
        _first_states[id(generator)] = (generator, digest(_state_of(generator)))
    return _first_states[id(generator)][1]


_first_states: dict[int, tuple[Any, str]] = {}


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def digest(state: Any) -> str:
    """Return a hash of a generator's state."""
    return hashlib.blake2b(pickle.dumps(state), digest_size=8).hexdigest()


def set_seed(generator: Any, seed: int) -> None:
    """Set a generator to what it would be if it had been made with a seed."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        kind: Any = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    else:
        generator.seed(seed % 2**32)
