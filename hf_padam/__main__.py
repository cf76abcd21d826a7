"""The `hf-padam` command, also `python -m hf_padam` (the form that `accelerate launch -m` takes)."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from . import __version__


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: The arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="hf-padam", description="PAdam for Hugging Face Transformers.")
    parser.add_argument("--version", action="version", version=f"hf-padam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help='run an unmodified training script with optim="padam" registered',
        description="Run a training script as python would, after registering the optimizer name padam. The script "
        "needs no change: what parses TrainingArguments takes --optim padam --optim_args p_norm=0.8,lambda_p=0.5.",
    )
    run.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module, as in python -m")
    run.add_argument("script", metavar="SCRIPT", help="a Python file, or a module with -m")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")
    args = parser.parse_args(argv)
    _run(run, args.script, args.arguments, args.module)


def _run(parser: argparse.ArgumentParser, script: str, arguments: list[str], is_module: bool) -> None:
    """Execute a script or module as ``__main__``. Importing this package has registered the name already."""
    if not is_module and not os.path.isfile(script):
        parser.error(f"{script!r} is not a file. Give the path of a Python script, or -m and the name of a module.")
    sys.argv = [script, *arguments]
    if is_module:
        sys.path.insert(0, os.getcwd())
        if not _module_exists(script):
            parser.error(f"there is no module named {script!r} in this Python ({sys.executable}).")
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        runpy.run_path(script, run_name="__main__")


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that should hold it
        return False


if __name__ == "__main__":
    main()
