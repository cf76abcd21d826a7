"""The rooms of the package, and which way its imports run."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "hf_padam"
FLOORS = ("sparsity", "files", "optim", "resuming", "training", "compression", "__init__", "__main__", "integrations")
"""From the ground up; a room is one floor, and imports run down or stay in the room. Nothing imports the highest."""
ROOMS = ("optim", "resuming", "training", "compression", "integrations")


def imports(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports, anywhere in it: absolute dotted names."""
    package = ["hf_padam", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1] if node.level else [])
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if exists(name) else module for name in names)


def exists(module: str) -> bool:
    path = REPOSITORY.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def floor(module: str) -> int:
    parts = module.split(".")
    return FLOORS.index(parts[1] if len(parts) > 1 else "__init__")


def violations(files: list[Path]) -> list[str]:
    found = []
    graph: dict[str, set[str]] = {}
    for file in files:
        name = module_name(file)
        own = {module for module in imports(file) if module.partition(".")[0] == "hf_padam"}
        graph[name] = own - {name}
        found += [f"{name} imports {module}: up" for module in own if floor(module) > floor(name)]
        if name.startswith("hf_padam.optim"):
            alien = {m.partition(".")[0] for m in imports(file)} - set(sys.stdlib_module_names)
            found += [f"{name} imports {m}" for m in alien - {"hf_padam", "torch", "torchao", "triton"}]
    try:
        TopologicalSorter(graph).prepare()
    except ValueError as error:
        found.append(str(error))
    return found


def test_ls_names_the_rooms():
    names = {p.name for p in PACKAGE.iterdir() if p.name not in ("__pycache__", "py.typed")}
    assert names == {f if f in ROOMS else f"{f}.py" for f in FLOORS}


def test_imports_run_down_without_a_circle_and_the_optimizer_knows_torch_alone():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    assert violations(files) == []


@pytest.mark.parametrize(
    ("file", "line", "why"),
    [
        ("optim/quantiles.py", "from ..training.metrics import Perplexity", "up"),
        ("resuming/settings.py", "def f():\n    from ..training import trainer", "up"),
        ("optim/update.py", "import accelerate", "imports accelerate"),
        ("optim/update.py", "from .padam import PAdam", "cycle"),
        ("sparsity.py", "import hf_padam", "up"),
        ("__init__.py", "from .integrations import axolotl", "up"),
    ],
)
def test_an_import_against_the_order_is_found(tmp_path, monkeypatch, file, line, why):
    import shutil

    import test_architecture

    shutil.copytree(PACKAGE, tmp_path / "hf_padam")
    monkeypatch.setattr(test_architecture, "PACKAGE", tmp_path / "hf_padam")
    monkeypatch.setattr(test_architecture, "REPOSITORY", tmp_path)
    changed = tmp_path / "hf_padam" / file
    changed.write_text(changed.read_text() + "\n" + line + "\n")
    assert any(why in violation for violation in violations(sorted((tmp_path / "hf_padam").rglob("*.py"))))


def test_update_imports_torch_alone():
    known = {module.partition(".")[0] for module in imports(PACKAGE / "optim" / "update.py")}
    assert known - set(sys.stdlib_module_names) == {"torch"}
