"""The `hf-padam` command, also `python -m hf_padam` (the form that `accelerate launch -m` takes)."""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence

from . import __version__
from .training.spawning import register_in_children


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
        "needs no change: what parses TrainingArguments takes --optim padam --optim_args p_norm=0.8,lambda_p=0.5. "
        "Processes that it starts with multiprocessing know the name too; other programs that it starts do not, "
        "unless it starts them with hf-padam run, or they import hf_padam.",
    )
    run.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module, as in python -m")
    run.add_argument("script", metavar="SCRIPT", help="a Python file, or a module with -m")
    run.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="the script's own arguments")
    for name, makes, source in (
        ("compress", "a compressed directory of a model", "with safetensors files"),
        ("decompress", "the standard directory of a compressed model", "that compress made"),
    ):
        command = commands.add_parser(name, help=f"make {makes}", description=f"Make {makes}, without loss.")
        command.add_argument("source", metavar="DIR", help=f"a directory {source}, or the id of a model on the Hub")
        command.add_argument("destination", metavar="OUT", help="the directory to make")
        command.add_argument("--force", action="store_true", help="replace a model's directory at OUT")
        if name == "compress":
            command.add_argument("--push_to_hub", metavar="ID", help="upload OUT to this repository, too")
            command.add_argument(
                "--private",
                action=argparse.BooleanOptionalAction,
                default=True,
                help="whether the repository is private, if --push_to_hub creates it (default: it is)",
            )
    sparsity = commands.add_parser(
        "sparsity",
        help="show the sparsity of a checkpoint, layer by layer",
        description="Show the zeros of a checkpoint's weights, layer by layer. The model is not built.",
    )
    sparsity.add_argument("model", metavar="MODEL", help="a directory, compressed or not, or a model's id on the Hub")
    sparsity.add_argument("--json", metavar="FILE", help="write every tensor's figures; - for the standard output")
    sparsity.add_argument("--picture", metavar="FILE", help="draw the zeros by layer (.png, .svg, .pdf)")
    sparsity.add_argument(
        "--pattern",
        metavar="N:M",
        default="2:4",
        help="the blocks to count: as in target_pattern, of M weights along the inputs at most N are not zero "
        "(default %(default)s)",
    )
    verify = commands.add_parser(
        "verify",
        help="check that a model's directory is whole and intact",
        description="Check a model's directory: every checksum of a compressed one, headers, sizes and names of a "
        "standard one. The exit status is 0 if it is intact, 1 if it is not, and 2 if there is no model to check.",
    )
    verify.add_argument("model", metavar="MODEL", help="a directory, compressed or not, or a model's id on the Hub")
    for name in ("compress", "decompress", "sparsity", "verify"):
        command = commands.choices[name]
        more = "; of a directory's upload, the branch" if name == "compress" else ""
        command.add_argument("--revision", help=f"the branch, tag or commit of a model on the Hub{more}")
        command.add_argument("--token", help="for the Hub (default: that of HF_TOKEN or `hf auth login`)")
    args = parser.parse_args(argv)
    if args.command == "run":
        _run(run, args.script, args.arguments, args.module)
        return
    work = {"sparsity": _sparsity, "verify": _verify}.get(args.command, _compression)
    try:
        _print(work(args))
    except (ValueError, OSError, ImportError) as error:
        message = f"hf-padam {args.command}: {error}"
        if args.command == "verify":  # whose exit status 1 says that a model is not intact
            verify.exit(2, f"{message}\n")
        raise SystemExit(message) from None


def _print(text: str) -> None:
    """Print, all of it now: of what fails to be written as Python ends it only says that an exception was ignored."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left over goes at the end
        raise


def _compression(args: argparse.Namespace) -> str:
    """Compress or decompress; return what to print."""
    from .compression.compress import compress, decompress
    from .compression.hub import upload

    options = {"force": args.force, "revision": args.revision, "token": args.token}
    if args.command == "decompress":
        return f"{decompress(args.source, args.destination, **options)} holds the standard checkpoint.\n"
    branch = args.revision if args.push_to_hub and os.path.isdir(args.source) else None
    result = compress(args.source, args.destination, **options | ({"revision": None} if branch else {}))
    if args.push_to_hub:
        upload(result.directory, args.push_to_hub, private=args.private, token=args.token, revision=branch)
    return f"{result}\n"


def _sparsity(args: argparse.Namespace) -> str:
    """Make the report; return what to print."""
    from .compression.hub import find
    from .compression.model_directory import ModelDirectory
    from .compression.sparsity_report import SparsityReport
    from .files import write_atomically
    from .optim.patterns import parse_pattern

    pattern = parse_pattern(args.pattern)
    with ModelDirectory(find(args.model, args.revision, args.token)) as model:
        if model.compressed:
            model.check()
        report = SparsityReport.of(model, pattern)
    if args.picture:
        report.draw(args.picture)
    if args.json == "-":
        return report.as_json()
    if args.json:
        write_atomically(args.json, report.as_json())
    return f"{report}\n"


def _verify(args: argparse.Namespace) -> str:
    """Verify a directory; return what to print, or exit where it is not intact."""
    from .compression.verify import verify

    found = verify(args.model, revision=args.revision, token=args.token)
    if not found.intact:
        _print(f"{found}\n")
        raise SystemExit(1)
    return f"{found}\n"


def _run(parser: argparse.ArgumentParser, script: str, arguments: list[str], is_module: bool) -> None:
    """Execute a script or module as ``__main__``. Importing this package has registered the name already."""
    register_in_children()
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
