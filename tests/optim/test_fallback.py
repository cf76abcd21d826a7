"""A backend that cannot run: refused if it was asked for, and replaced by eager mode, audibly, if "auto" chose it."""

import builtins
import errno
import os
import re
import sys

import pytest
import torch

from hf_padam import PAdam
from hf_padam.optim import backends
from hf_padam.optim.backends import checks, compiled, eager, triton
from hf_padam.optim.update import prepare

CPU = torch.device("cpu")
LARGE = 10**9
needs_compiler = pytest.mark.skipif(
    compiled.unavailable(CPU) is not None, reason="runs where there are a C++ compiler and Python.h"
)
HYPERPARAMETERS = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, lambda_p=0.1, weight_decay=0.01)
GCC = "C++ compile error\n\nCommand:\ng++ x.cpp\n\nOutput:\nIn file x.cpp:1:\nx.h:3:9: fatal error: no omp.h\n"
ERRORS = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "OSError: .*No space left"),
    "read-only cache": (PermissionError("cache"), "PermissionError: cache"),
    "compiler's words": (RuntimeError(GCC), "fatal error: no omp.h"),
    "no message": (AssertionError(), "AssertionError"),
    "blank message": (RuntimeError("\n \n"), "RuntimeError"),
}


@pytest.fixture(autouse=True)
def untried():
    """Make this process forget what it has found out about backends, before and after."""
    caches = (compiled.unavailable, triton.unavailable, compiled._kernel, backends._say_that_eager_runs)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def lists(dtype=torch.float32):
    weight = torch.linspace(-1, 1, 1000)
    return [[t.to(dtype)] for t in (weight, weight.sin(), weight / 3, weight.square())]


def assert_eager_runs(caplog, why):
    """What "auto" chooses takes a step as eager does, and says why, once."""
    for _ in range(2):
        ours, theirs = lists(), lists()
        scalars = prepare(1, p_norm=0.8, **HYPERPARAMETERS)
        backends.select("auto", CPU, LARGE).step(*ours, scalars)
        eager.step(*theirs, scalars)
        assert all(torch.equal(a, b) for [a], [b] in zip(ours, theirs, strict=True))
    [said] = warnings(caplog)
    assert re.search(why, said)


def warnings(caplog):
    return [record.message for record in caplog.records if "eager mode" in record.message]


def fail(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.parametrize("what", ERRORS)
def test_where_no_kernel_can_be_built_an_explicit_choice_raises_and_auto_says_so_once(what, monkeypatch, caplog):
    from hf_padam.optim.backends import inductor

    error, why = ERRORS[what]
    monkeypatch.setattr(inductor, "compile_over_rows", fail(error))
    with pytest.raises(RuntimeError, match=f'backend="compiled" cannot run on cpu: .*{why}.*backend="auto"'):
        PAdam([torch.nn.Parameter(torch.ones(3))], backend="compiled")
    assert_eager_runs(caplog, why)


def broken_compiler(directory):
    """A compiler that answers questions, and compiles nothing."""
    file = directory / "g++"
    file.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "g++ 12.0" && exit 0\necho " error: broken" >&2; exit 1\n'
    )
    file.chmod(0o755)
    return str(file)


@needs_compiler
def test_a_compiler_that_compiles_nothing(monkeypatch, caplog, tmp_path):
    from hf_padam.optim.backends import inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(inductor, "_compilers", lambda: (broken_compiler(tmp_path),))
    assert_eager_runs(caplog, "error: broken")


@needs_compiler
def test_a_cache_that_cannot_be_written(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_eager_runs(caplog, "cannot be built")


@pytest.mark.parametrize("error", [ImportError("no compile_fx_inner"), FileNotFoundError("/proc/nope")], ids=str)
def test_an_inductor_that_cannot_be_imported(error, monkeypatch, caplog):
    real = builtins.__import__

    def imported(name, globals=None, locals=None, fromlist=(), level=0):
        if level and "inductor" in (fromlist or ()):
            raise error
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", imported)
    assert_eager_runs(caplog, str(error))


@needs_compiler
@pytest.mark.parametrize("own", [(None, "nowhere-g++"), "nowhere-g++", None])
@pytest.mark.parametrize("name", ["g++", "clang++", "c++"])
def test_any_of_the_usual_names_of_a_compiler_will_do(name, own, monkeypatch, tmp_path):
    from torch._inductor import config
    from torch._inductor.cpp_builder import cpp_compiler_search

    from hf_padam.optim.backends import inductor

    os.rename(broken_compiler(tmp_path), tmp_path / name)
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_compiler_search.cache_clear()
    try:
        with config.patch({"cpp.cxx": own}):
            assert cpp_compiler_search(inductor._compilers()) == name
    finally:
        cpp_compiler_search.cache_clear()


@needs_compiler
@pytest.mark.parametrize("what", ERRORS)
def test_a_kernel_that_cannot_be_built_later_is_left_to_eager_and_not_tried_again(what, monkeypatch, caplog):
    from hf_padam.optim.backends import inductor

    error, why = ERRORS[what]
    chosen, explicit = backends.select("auto", CPU, LARGE), backends.select("compiled", CPU, LARGE)
    assert compiled.unavailable(CPU) is None and not warnings(caplog)
    attempts = []
    monkeypatch.setattr(inductor, "compile_over_rows", lambda *_: (attempts.append(1), fail(error)()))
    options = HYPERPARAMETERS | {"p_norm": 1.5}
    for _ in range(3):
        ours, theirs, untouched = lists(), lists(), lists()
        chosen.step(*ours, prepare(1, **options))
        eager.step(*theirs, prepare(1, **options))
        assert all(torch.equal(a, b) for [a], [b] in zip(ours, theirs, strict=True))
        with pytest.raises(checks.KernelError, match=f"THREE_HALVES.*{why}"):
            explicit.step(*untouched, prepare(1, **options))
        assert all(torch.equal(a, b) for [a], [b] in zip(untouched, lists(), strict=True))
    assert len(attempts) == len(warnings(caplog)) == 1


def cuda_that(monkeypatch, outcome):
    """Pretend that there is a GPU, on which comparing with eager has an outcome."""
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(triton, "disagreement", outcome)


@pytest.mark.parametrize("what", ERRORS)
def test_triton_gives_the_reason_of_any_error(what, monkeypatch, caplog):
    error, why = ERRORS[what]
    cuda_that(monkeypatch, fail(error))
    with pytest.raises(RuntimeError, match=f'backend="triton" cannot run on cuda.*{why}'):
        backends.check("triton", torch.device("cuda"))
    assert [backends.select("auto", torch.device("cuda"), LARGE) for _ in range(2)] == [eager, eager]
    [said] = warnings(caplog)
    assert "on cuda" in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_lacks_for_a_while_disables_triton_for_as_long(error, monkeypatch, caplog):
    answers = [fail(error), fail(error), lambda *_: None]
    cuda_that(monkeypatch, lambda *_: answers.pop(0)())
    cuda = torch.device("cuda")
    assert [backends.select("auto", cuda, LARGE) for _ in range(2)] == [eager, eager]
    [said] = warnings(caplog)
    assert "tried again" in said
    assert backends.select("auto", cuda, LARGE).backend is triton and not answers
    assert backends.select("auto", cuda, LARGE).backend is triton


def test_memory_that_lacks_for_a_while_is_no_reason_to_give_up_compiling(monkeypatch, caplog):
    from hf_padam.optim.backends import inductor

    build = inductor.compile_over_rows
    answers = [fail(MemoryError()), fail(OSError(errno.ENOMEM, "Cannot allocate memory"))]
    monkeypatch.setattr(inductor, "compile_over_rows", lambda *args: (answers.pop(0) if answers else build)(*args))
    for kept in (compiled.unavailable, compiled._kernel):
        kept.cache_clear()
    cpu = torch.device("cpu")
    assert backends.select("auto", cpu, LARGE) is eager and "tried again" in caplog.text
    compiled_or_eager = backends._OR_EAGER["compiled"]
    tensors = [[torch.ones(64)] for _ in range(4)]
    options = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, p_norm=0.8, lambda_p=0.1, weight_decay=0.0)
    compiled_or_eager.step(*tensors, prepare(1, **options))
    assert not answers and tensors[0][0][0] != 1, "the second lack of memory: eager took that step"
    assert backends.select("auto", cpu, LARGE).backend is compiled


@pytest.mark.parametrize(
    ("wrong", "case"),
    [
        (wrong, case)
        for wrong, concerns in {
            "weights": lambda case: True,
            "second moments": lambda case: True,
            "s": lambda case: "s_rate" in case.options,
            "rounding": lambda case: case.rounds,
        }.items()
        for case in checks.THOROUGH
        if concerns(case)
    ],
    ids=str,
)
def test_a_backend_whose_results_differ_is_found_out(wrong, case):
    def step(params, grads, exp_avgs, exp_avg_sqs, scalars, rounding, s):
        if wrong == "rounding":
            rounding = rounding._replace(step_key=rounding.step_key + 1)
        eager.step(params, grads, exp_avgs, exp_avg_sqs, scalars, rounding, s)
        column = {"weights": params, "second moments": exp_avg_sqs, "s": s}.get(wrong)
        if column:
            column[0][-1] *= 1.02

    assert checks.disagreement(eager.step, CPU, [case]) is None
    assert "differ from eager's" in checks.disagreement(step, CPU, [case])


@pytest.mark.parametrize("broken", ["triton", "hf_padam.optim.backends.triton_kernel"])
def test_triton_that_cannot_be_imported_is_a_reason_too(broken, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, broken, None)
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(RuntimeError, match='backend="triton" cannot run on cuda.*import'):
        backends.check("triton", torch.device("cuda"))
    assert backends.select("auto", torch.device("cuda"), LARGE) is eager
    assert len(warnings(caplog)) == 1


def test_auto_tries_the_device_that_holds_the_tensors(monkeypatch):
    """Not another of its kind, which may be full, or of another make."""
    asked = []
    monkeypatch.setattr(triton, "unavailable", asked.append)
    for index in (1, 0):
        assert backends.select("auto", torch.device("cuda", index), 1) is not eager
    assert asked == [torch.device("cuda", 1), torch.device("cuda", 0)]
