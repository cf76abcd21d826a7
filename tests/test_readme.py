"""What the READMEs name exists: links, anchors, paths, options, and the names in their Python examples."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import REPOSITORY

import hf_padam
from hf_padam import PAdamTrainingArguments
from hf_padam.training.registration import OPTIONS

READMES = [REPOSITORY / "README.md", REPOSITORY / "recipes" / "README.md"]
MOST_LINES, MOST_COLUMNS = 200, 119  # of README.md; of its prose
TRAINING = {
    f"recipes/{name}.py"
    for name in ("finetune_clm", "finetune_clm_no_trainer", "finetune_lora", "finetune_trl_sft", "pretrain_char")
}
PLANNED = {"recipes/compare.py", "recipes/sweep.py"}  # hand what they do not know to a training recipe
SLURM = {"--signal"}
TRANSFORMERS = {"device_map"}  # names of its that we have no need of ourselves
OPTION = r"(?<![\w-])--[a-z][\w-]*"


def check_all(text: str, directory: Path) -> list[str]:
    """Return what is wrong with a README of this text in this directory."""
    checks = (broken_links, missing_paths, unknown_options, unknown_names, broken_examples)
    return [fault for check in checks for fault in check(text, directory)]


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def code_spans(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, directory: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = directory / path if path else None
        if file and not file.exists():
            yield f"link to {target}: no such file"
        elif anchor and anchor not in anchors(file.read_text() if file else text):
            yield f"link to {target}: no such heading"


def missing_paths(text: str, directory: Path) -> Iterator[str]:
    for path in re.findall(r"(?<![\w/.])(?:recipes|hf_padam|tests)/[\w/.]*\w/?", text):
        if not (REPOSITORY / path).exists():
            yield f"{path}: no such file"
    for name in code_spans(text):
        if re.fullmatch(r"[\w]+\.(py|yaml)", name) and not list(REPOSITORY.glob(f"*/**/{name}")):
            if name != "run_config.yaml":  # of a run
                yield f"{name}: no such file"


@functools.cache
def help_of(program: str) -> str:
    """What a script of the repository, or hf-padam, alone or with a command, prints at --help."""
    argv = program.split() + ["--help_all" if program in TRAINING else "--help"]
    printed = io.StringIO()
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        if argv[0] == "hf-padam":
            from hf_padam.__main__ import main

            main(argv[1:])
        else:
            runpy.run_path(str(REPOSITORY / argv[0]), run_name="__main__")
    assert end.value.code == 0, program
    return printed.getvalue()


def commands() -> list[str]:
    """The commands of hf-padam but for run, which has no options of its own."""
    return [name for name in re.findall(r"^    (\w+)\s", help_of("hf-padam"), re.MULTILINE) if name != "run"]


def options_of(program: str) -> frozenset[str]:
    found = frozenset(re.findall(r"^ +(?:-\w, )?(--\w+)", help_of(program), re.MULTILINE))
    if program in PLANNED:
        found |= options_of("recipes/finetune_clm.py") | options_of("recipes/pretrain_char.py")
    return found


@functools.cache
def launcher_options() -> frozenset[str]:
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parsers = (launch_command_parser(), get_args_parser())
    return frozenset(option for parser in parsers for action in parser._actions for option in action.option_strings)


@functools.cache
def all_options() -> frozenset[str]:
    scripts = {f"recipes/{p.name}" for p in (REPOSITORY / "recipes").glob("*.py")} | {"tests/resuming/kill_test.py"}
    programs = scripts | {f"hf-padam {name}" for name in commands()}
    return frozenset().union(*(options_of(program) for program in programs)) | launcher_options() | SLURM


def program_of(words: list[str]) -> tuple[int, str] | None:
    """Where in a command line a program of ours stands, and which one it is; None if there is none."""
    for i, word in enumerate(words):
        if word in ("hf-padam", "hf_padam") and words[i + 1 :]:
            if words[i + 1] == "run":  # a script with the Trainer's options
                return i + 1, "recipes/finetune_clm.py"
            if words[i + 1] in commands():
                return i + 1, f"hf-padam {words[i + 1]}"
        for candidate in (word, f"recipes/{word}"):
            if word.endswith(".py") and (REPOSITORY / candidate).is_file():
                return i, candidate
    return None


def unknown_options(text: str, directory: Path) -> Iterator[str]:
    """Options that a program on the same command line does not have; in other places, that no program has."""
    lines = [line for block in code_blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    for command in [part for line in lines for part in line.partition(" #")[0].split("&&")] + code_spans(text):
        try:
            words = shlex.split(command)
        except ValueError:  # prose in a code span
            words = command.split()
        if words[:1] == ["hf-padam"] and words[1:2] and words[1] not in ("run", *commands()):
            yield f"hf-padam {words[1]}: no such command"
        given = [(i, option) for i, word in enumerate(words) for option in re.findall(f"^{OPTION}", word)]
        found = program_of(words)
        for i, option in given:
            if found and option not in (options_of(found[1]) if i > found[0] else launcher_options()):
                yield f"{option}: {found[1]} has no such option (in {command!r})"
            elif option not in all_options():
                yield f"{option}: no program has such an option (in {command!r})"
    for option in re.findall(OPTION, re.sub(r"^```.*?^```|`[^`]+`", "", text, flags=re.DOTALL | re.MULTILINE)):
        if option not in all_options():
            yield f"{option}: no program has such an option"
    for pairs in re.findall(r"optim_args[= ]\"?((?:\w+=[^\s,\"`]+,?)+)", text):
        for key in re.findall(r"(\w+)=", pairs):
            if key not in OPTIONS:
                yield f"{key}: optim_args has no such key"


@functools.cache
def words_of_the_code() -> frozenset[str]:
    files = [*(REPOSITORY / "hf_padam").rglob("*.py"), *(REPOSITORY / "recipes").rglob("*.py")]
    files += (REPOSITORY / "recipes").rglob("*.yaml")
    fields = {field.name for field in dataclasses.fields(PAdamTrainingArguments)}
    return frozenset(word for file in files for word in re.findall(r"\w+", file.read_text())) | fields


def unknown_names(text: str, directory: Path) -> Iterator[str]:
    """Names in code spans, ``like_this`` or ``key=value``, that neither the code nor the training arguments have."""
    for span in code_spans(text):
        name = re.match(r"[a-z]\w*_\w+(?=$|=|:)", span)
        if name and name[0] not in words_of_the_code() | TRANSFORMERS:
            yield f"{name[0]}: the code has no such name"
    for table in re.findall(r"^\| option \|.*\n\|[-:| ]+\n((?:\|.*\n)*)", text, re.MULTILINE):
        for row in table.splitlines():
            for name in re.findall(r"`(\w+)`", row.split("|")[1]):
                if name not in {field.name for field in dataclasses.fields(PAdamTrainingArguments)}:
                    yield f"{name}: PAdamTrainingArguments has no such option"


def broken_examples(text: str, directory: Path) -> Iterator[str]:
    """Python that does not parse, imports what hf_padam does not have, or gives its names unknown arguments."""
    spans = [span for span in code_spans(text) if span.isascii() and re.fullmatch(r"[\w. =]+\(.*\)", span)]
    for source in code_blocks(text, "python") + spans:
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError as error:
            yield f"{source!r}: {error}"
            continue
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "hf_padam":
                yield from (f"{a.name}: not in hf_padam" for a in node.names if not hasattr(hf_padam, a.name))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_padam":
                if not hasattr(hf_padam, node.attr):
                    yield f"hf_padam.{node.attr}: not in hf_padam"
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in hf_padam.__all__:
                parameters = inspect.signature(getattr(hf_padam, node.func.id)).parameters
                if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                    continue
                for keyword in node.keywords:
                    if keyword.arg and keyword.arg not in parameters:
                        yield f"{node.func.id}: no argument {keyword.arg}"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_a_readme_names_exists(readme):
    assert check_all(readme.read_text(), readme.parent) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("[a](recipes/nothing.md)", "recipes/nothing.md: no such file"),
        ("[a](#nothing)", "no such heading"),
        ("[a](recipes/README.md#nothing)", "no such heading"),
        ("![a](recipes/results/nothing.png)", "no such file"),
        ("Open `recipes/configs/nothing.yaml`.", "no such file"),
        ("Open `hf_padam/optimizer.py`.", "no such file"),
        ("Run `nothing.py`.", "no such file"),
        ("With `--nothing 3` it", "no program has"),
        ("With --nothing it", "no program has"),
        ("```bash\npython recipes/compare.py PLAN.yaml --trials 3\n```", "recipes/compare.py has no such option"),
        ("```bash\npython recipes/sweep.py PLAN.yaml \\\n    --picture x\n```", "recipes/sweep.py has no such option"),
        ("```bash\nhf-padam decompress a b --pattern 2:4\n```", "hf-padam decompress has no such option"),
        ("```bash\nhf-padam run a.py --p_nrm 1\n```", "--p_nrm"),
        ("```bash\naccelerate launch --jobs 2 recipes/compare.py\n```", "--jobs"),
        ("Then `hf-padam nothing DIR`.", "hf-padam nothing: no such command"),
        ('`optim_args="p_norm=0.5,nothing=1"`', "nothing: optim_args has no such key"),
        ("The field `p_nrom_schedule` or", "the code has no such name"),
        ("| option | default |\n|---|---|\n| `nothing` | 1 |\n", "PAdamTrainingArguments has no such option"),
        ("```python\nfrom hf_padam import Nothing\n```", "Nothing: not in hf_padam"),
        ("```python\nPAdam(groups, nothing=1)\n```", "PAdam: no argument nothing"),
        ("Or `PAdamTrainingArguments(p_nrom=1)`.", "PAdamTrainingArguments: no argument p_nrom"),
        ("```python\nPAdam(\n```", "never closed"),
    ],
)
def test_what_does_not_exist_is_found(line, fault):
    faults = check_all(line + "\n", REPOSITORY)
    assert any(fault in found for found in faults), faults


def test_the_readme_is_short_and_names_every_room():
    text = READMES[0].read_text()
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > MOST_COLUMNS and not line.startswith("|")] == []
    paths = [path for path in (REPOSITORY / "hf_padam").iterdir() if not path.name.startswith("__")]
    entries = {path.name for path in paths if path.name != "py.typed"}
    assert {name for name in entries if f"hf_padam/{name}" not in text} == set()
