"""The kept plan of a step: whatever changes between two steps is noticed, and nothing of it is held on to."""

import copy
import gc
import io
import itertools
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

from hf_padam import PAdam, PAdam8bit, TargetSparsity
from hf_padam.optim.backends import BACKENDS, eager

CPU = torch.device("cpu")
BACKENDS_HERE = [
    pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=f"needs what is missing here: {why}"))
    for name, why in ((name, backend.unavailable(CPU)) for name, backend in BACKENDS.items())
]


def build(backend, dtype=torch.float32, **options):
    """Two groups of parameters of several layouts, and more that are in none."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (5, 3), (64,), (16, 16), (7,), (4, 4)]
    params = [nn.Parameter((torch.randn(shape, generator=generator) / 10).to(dtype)) for shape in shapes]
    groups = [{"params": params[:3]}, {"params": params[3:5], "lambda_p": 0.1, "p_norm": 0.5}]
    return params, PAdam(groups, **dict(lr=1e-2, p_norm=0.8, lambda_p=0.05, backend=backend) | options)


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def at(optimizer, param, **values):
    optimizer.state[param].update(values)


def swapped(params, optimizer, keep_state):
    """Another parameter in the place of one, as accelerate does for FSDP2."""
    new = nn.Parameter(params[0].detach().clone())
    if keep_state:
        optimizer.state[new] = optimizer.state.pop(params[0])
    new.grad, params[0] = params[0].grad, new
    optimizer.param_groups[0]["params"][0] = new


def reset_moments(params, optimizer):
    """Drops old moments before new ones take, most likely, their place in memory."""
    shape = params[0].shape
    del optimizer.state[params[0]]["exp_avg"]
    optimizer.state[params[0]] = {
        "step": torch.tensor(2.0),
        "exp_avg": torch.zeros(shape, dtype=torch.bfloat16),
        "exp_avg_sq": torch.ones(shape, dtype=torch.bfloat16),
    }


def new_data(params, optimizer):
    params[0].data = params[0].data.clone()


def smaller(params, optimizer):
    """Rows that are pruned away, at the same address."""
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[params[3]][name].data = optimizer.state[params[3]][name].data[:8]
    params[3].grad = None
    params[3].data = params[3].data[:8]
    params[3].grad = torch.ones_like(params[3])


def other_dtype(params, optimizer):
    """As `model.bfloat16()`, which keeps the parameters and the state."""
    for param in params:
        param.data = param.data.bfloat16()
        param.grad = param.grad.bfloat16()


def mixed_gradient(params, optimizer):
    if hasattr(params[0], "grad_dtype"):  # torch has it since 2.10
        params[0].grad_dtype = None
        params[0].grad = params[0].grad.bfloat16()


def frozen(params, optimizer):
    params[1].requires_grad_(False)
    params[1].grad = None


def no_gradient(params, optimizer):
    params[3].grad = None


def transposed_gradient(params, optimizer):
    params[0].grad = params[0].grad.t().contiguous().t()


def in_state(**change):
    """Edits the first parameter's state: a value, or what becomes of the old one."""

    def edit(params, optimizer):
        state = optimizer.state[params[0]]
        at(optimizer, params[0], **{name: f(state[name]) if callable(f) else f for name, f in change.items()})

    return edit


def in_group(number=0, **values):
    return lambda params, optimizer: optimizer.param_groups[number].update(values)


def regrouped(params, optimizer):
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())


def loaded(params, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        own["step"] += 5
    optimizer.load_state_dict(state)


CHANGES = {
    "nothing": lambda params, optimizer: None,
    "a group is added": lambda params, optimizer: optimizer.add_param_group({"params": [params[5]], "lambda_p": 0.2}),
    "a state is loaded": loaded,
    "a parameter is swapped": lambda p, o: swapped(p, o, keep_state=False),
    "a parameter is swapped and keeps its state": lambda p, o: swapped(p, o, keep_state=True),
    "a parameter goes to another group": regrouped,
    "groups change places": lambda params, optimizer: optimizer.param_groups.reverse(),
    "new data": new_data,
    "smaller data": smaller,
    "another dtype": other_dtype,
    "a gradient of another dtype": mixed_gradient,
    "a frozen parameter": frozen,
    "no gradient": no_gradient,
    "a transposed gradient": transposed_gradient,
    "the state is cleared": lambda params, optimizer: optimizer.state.clear(),
    "one state is deleted": lambda params, optimizer: optimizer.state.pop(params[1]),
    "one state is emptied": lambda params, optimizer: optimizer.state[params[1]].clear(),
    "a moment is replaced": in_state(exp_avg=lambda old: old * 2),
    "a moment is zeroed": in_state(exp_avg=lambda old: old.zero_()),
    "a moment is transposed": in_state(exp_avg=lambda old: old.t()),
    "a moment gets new data": in_state(exp_avg=lambda old: old.set_(old.clone())),
    "a moment of another dtype": in_state(exp_avg_sq=lambda old: old.bfloat16()),
    "moments are dropped and made anew": reset_moments,
    "a step number is replaced": in_state(step=torch.tensor(9.0)),
    "a step number is set": in_state(step=lambda old: old.fill_(9)),
    "a step number's data is set": in_state(step=lambda old: old.data.fill_(9) and old),
    "a step number gets other data": in_state(step=lambda old: setattr(old, "data", torch.tensor(9.0)) or old),
    "a step number is an int": in_state(step=9),
    "a step number is 64 bits wide": in_state(step=torch.tensor(9, dtype=torch.int64)),
    "the learning rate": in_group(lr=1e-3),
    "p": in_group(1, p_norm=1.0),
    "s begins": in_group(s_rate=0.3),
    "late decay": in_group(late_decay=True),
}  # fmt: skip


NEW_KERNELS = {name for name in CHANGES if "another dtype" in name or "made anew" in name}


@pytest.mark.parametrize(
    ("backend", "change"),
    [
        pytest.param(*backend.values, change, marks=[*backend.marks, *slow])
        for backend, change in itertools.product(BACKENDS_HERE, CHANGES)
        for slow in [[pytest.mark.slow] if backend.values == ("compiled",) and change in NEW_KERNELS else []]
    ],
)
def test_what_changes_between_two_steps_is_noticed(backend, change):
    ends = []
    for kept in (True, False):
        params, optimizer = build(backend if kept else "eager")
        for step in range(6):
            set_gradients(params, step)
            if step == 3:
                CHANGES[change](params, optimizer)
            if not kept:
                optimizer._plan = None
            optimizer.step()
        ends.append((params, [optimizer.state[param] for param in params]))
    low = backend == "triton" and "moment" in change  # the interpreter truncates where bf16 should be rounded
    unit = torch.finfo(torch.bfloat16 if low else ends[0][0][0].dtype).eps
    for ours, theirs in zip(*(params for params, _ in ends), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=max(2e-5, 2 * unit), atol=max(1e-7, unit / 10))
    for ours, theirs in zip(*(states for _, states in ends), strict=True):
        assert ours.keys() == theirs.keys() and ours.get("step") == theirs.get("step")


@pytest.mark.parametrize("change", [in_group(rounding_seed=7), in_group(bf16_stochastic_round=False)])
def test_how_to_round_is_noticed(change):
    ends = []
    for kept in (True, False):
        params, optimizer = build("eager", torch.bfloat16, bf16_stochastic_round=True)
        for step in range(4):
            set_gradients(params, step)
            if step == 2:
                change(params, optimizer)
            if not kept:
                optimizer._plan = None
            optimizer.step()
        ends.append(params)
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", ["nothing", "the learning rate", "p"])
def test_one_plan_serves_as_long_as_nothing_but_scalars_changes(change):
    params, optimizer = build("eager")
    plans = set()
    for step in range(6):
        set_gradients(params, step)
        if step == 3:
            CHANGES[change](params, optimizer)
        optimizer.step()
        plans.add(optimizer._plan)
    assert len(plans) == 1


def test_what_is_taken_out_of_the_optimizer_is_freed_at_once():
    params, optimizer = build("eager")
    set_gradients(params, 0)
    optimizer.step()
    gradient = weakref.ref(params[0].grad)
    moments = weakref.ref(optimizer.state[params[1]]["exp_avg"])
    optimizer.zero_grad()
    optimizer.state[params[1]].clear()  # as when states are moved to the host between two phases
    assert gradient() is None and moments() is None


def test_step_numbers_are_what_torch_expects_of_them():
    params, optimizer = build("eager")
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for state in (optimizer.state_dict(), torch.load(file, weights_only=True)):
        numbers = [own["step"] for own in state["state"].values()]
        assert numbers == [3] * 5
        assert all(type(n) is torch.Tensor and n.shape == () and n.dtype == torch.float32 for n in numbers)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_step_that_fails_does_not_count(backend):
    params, optimizer = build(backend)
    set_gradients(params, 0)
    with mock.patch.object(BACKENDS[backend], "step", side_effect=RuntimeError("out of memory")):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="out of memory"):
                optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params[:5]] == [0] * 5


def test_of_a_step_that_fails_halfway_the_groups_that_were_done_count():
    params, optimizer = build("eager")
    set_gradients(params, 0)
    optimizer.step()
    step, calls = eager.step, []

    def fails_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        step(*args, **kwargs)

    with mock.patch.object(eager, "step", fails_at_the_second), pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params[:5]] == [2, 2, 2, 1, 1]
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params[:5]] == [3, 3, 3, 2, 2]


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("left", ["state", "gradient"])
def test_what_was_left_behind_is_refused_before_a_kernel_reads_there(backend, left):
    """The meta device stands for a GPU from which the model was moved, or to which; sizes may differ, too."""
    params, optimizer = build(backend)
    set_gradients(params, 0)
    if left == "state":
        optimizer.step()
        optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].to("meta")
    else:
        params[0].data = torch.ones(64, *params[0].shape[1:])
    with pytest.raises(ValueError, match="exp_avg .*is on meta" if left == "state" else "gradient of a parameter"):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_a_state_of_another_shape_is_refused_before_a_kernel_runs_past_its_end(backend, name):
    params, optimizer = build(backend)
    set_gradients(params, 0)
    optimizer.step()
    loaded = optimizer.state_dict()
    loaded["state"][3][name] = torch.zeros(2, 16)
    optimizer.load_state_dict(loaded)
    before = [param.clone() for param in params]
    with pytest.raises(ValueError, match=rf"{name} of a parameter of shape \(16, 16\) on cpu has the shape \(2, 16\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_a_state_that_was_emptied_after_a_parameter_had_no_gradient_starts_anew():
    params, optimizer = build("eager")
    for step in range(3):
        set_gradients(params, step)
        params[0].grad = None if step == 1 else params[0].grad
        optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_a_model_whose_parameters_are_swapped_is_stepped_on():
    """As torch does when an FSDP2 model is moved: to the host between two phases, for example."""
    params, optimizer = build("eager")
    twins, other = build("eager")
    for step in range(4):
        set_gradients(params, step)
        set_gradients(twins, step)
        if step == 2:
            moved = nn.Parameter(params[0].detach().clone())
            moved.grad = params[0].grad
            torch.utils.swap_tensors(params[0], moved)
        optimizer.step()
        other.step()
    assert all(map(torch.equal, params, twins))


def test_a_step_that_fails_before_it_begins_leaves_no_decay_that_nothing_steers():
    params, optimizer = build("eager")
    TargetSparsity(optimizer, 0.5, 20)
    for step in range(8):
        set_gradients(params, step)
        optimizer.step()

    def closure():
        assert any(group["reference"] > 0 for group in optimizer.param_groups)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert all(group["reference"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("optimizer_class", [PAdam, PAdam8bit])
def test_groups_to_which_the_same_is_done_take_their_step_together(backend, optimizer_class, monkeypatch):
    """As those of target_scope="layer" do while zeros are held, one group for each matrix."""
    if optimizer_class is PAdam8bit:
        pytest.importorskip("torchao")

    def built(together):
        generator = torch.Generator().manual_seed(0)
        sizes = (64, 30, 30, 64, 30, 30)  # in 8 bits, the large are stepped one by one
        params = [nn.Parameter(torch.randn(size, 64, generator=generator)) for size in sizes]
        lists = [params[:4], params[4:]] if together else [[param] for param in params]
        groups = [{"params": own, "lr": 1e-3 if own[0] in set(params[:4]) else 1e-2} for own in lists]
        return params, optimizer_class(groups, p_norm=0.5, lambda_p=0.05, backend=backend)

    calls = []
    step = BACKENDS[backend].step
    monkeypatch.setattr(BACKENDS[backend], "step", lambda *a, **k: calls.append(len(a[0])) or step(*a, **k))
    (params, optimizer), (twins, other) = built(True), built(False)
    for i in range(3):
        set_gradients(params, i)
        set_gradients(twins, i)
        optimizer.step()
        by_two, calls[:] = calls[:], []
        other.step()
        assert calls == by_two
        calls.clear()
        if i == 1:
            for group in (optimizer.param_groups[0], *other.param_groups[:4]):
                group["lr"] = 2e-3
    assert all(map(torch.equal, params, twins))
    other.param_groups[1]["lr"] = 3e-3  # ends what is done to the first four together
    set_gradients(twins, 4)
    other.step()
    assert calls == ([1, 1, 2, 2] if optimizer_class is PAdam else [1, 1, 1, 1, 2])


def test_a_plan_that_is_replaced_is_freed_at_once():
    """With all that was made for its launches; not when the garbage is collected, which may be much later."""
    params = [nn.Parameter(torch.randn(8)) for _ in range(2)]
    optimizer = PAdam(params, lr=1e-3, backend="eager")
    plans: weakref.WeakSet = weakref.WeakSet()
    gc.disable()
    try:
        for step in range(6):
            params[0].grad = torch.randn(8)
            params[1].grad = torch.randn(8) if step % 2 else None
            optimizer.step()
            plans.add(optimizer._plan)
        assert len(plans) == 1
    finally:
        gc.enable()
