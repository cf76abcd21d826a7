"""PAdam as a torch optimizer: state, groups, copies, closures, refusals."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from hf_padam import PAdam, TargetSparsity, add_pnorm_decay
from hf_padam.optim import importance

OPTIONS = dict(lr=1e-2, p_norm=0.8, lambda_p=0.05)


def make(shape=(5, 3), dtype=torch.float32, **options):
    param = nn.Parameter((torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype))
    return param, PAdam([param], **(OPTIONS | options))


def advance(param, optimizer, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def test_state_is_created_at_the_first_step_only():
    param, optimizer = make()
    assert len(optimizer.state) == 0
    advance(param, optimizer, 1)
    assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[param]["step"].item() == 1


@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_state_dtype_survives_a_round_trip(dtype, state_dtype):
    param, optimizer = make(dtype=dtype)
    advance(param, optimizer)
    assert optimizer.state[param]["exp_avg_sq"].dtype == state_dtype
    twin = nn.Parameter(param.detach().clone())
    restored = PAdam([twin], **OPTIONS)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.state[twin]["exp_avg_sq"].dtype == state_dtype
    advance(param, optimizer, seed=2)
    advance(twin, restored, seed=2)
    assert torch.equal(param, twin)


@pytest.mark.parametrize(
    ("dtype", "s_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_s_is_kept_for_the_groups_that_use_it_and_goes_on_exactly(dtype, s_dtype):
    param, optimizer = make(dtype=dtype, s_rate=0.1)
    plain, undecayed = (nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    optimizer.add_param_group({"params": [plain], "s_rate": 1.0})
    optimizer.add_param_group({"params": [undecayed], "lambda_p": 0.0})
    plain.grad, undecayed.grad = torch.ones_like(plain), torch.ones_like(undecayed)
    advance(param, optimizer)
    assert "s" not in optimizer.state[plain] and "s" not in optimizer.state[undecayed]
    assert optimizer.state[param]["s"].dtype == s_dtype and optimizer.state[param]["s"].shape == param.shape
    twin, restored = nn.Parameter(param.detach().clone()), None
    others = [nn.Parameter(p.detach().clone()) for p in (plain, undecayed)]
    restored = PAdam([{"params": [p]} for p in (twin, *others)], lr=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.state[twin]["s"].dtype == s_dtype
    advance(param, optimizer, seed=2)
    advance(twin, restored, seed=2)
    assert torch.equal(param, twin) and torch.equal(optimizer.state[param]["s"], restored.state[twin]["s"])
    restored.param_groups[0]["s_rate"] = 1.0
    advance(twin, restored, 1)
    assert "s" not in restored.state[twin], "it would be stale when it is wanted again"


def test_late_decay_and_s_exclude_each_other():
    with pytest.raises(ValueError, match="late_decay=True and s_rate=0.5 exclude each other"):
        PAdam([nn.Parameter(torch.ones(2))], late_decay=True, s_rate=0.5)


def test_fp32_state_loads_into_a_bf16_model_uncast():
    param, optimizer = make()
    advance(param, optimizer)
    low = nn.Parameter(param.detach().bfloat16())
    restored = PAdam([low], **OPTIONS)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.state[low]["exp_avg"].dtype == torch.float32
    assert torch.equal(restored.state[low]["exp_avg"], optimizer.state[param]["exp_avg"])
    assert restored.state[low]["exp_avg"] is not optimizer.state[param]["exp_avg"]
    advance(low, restored)


def test_load_state_dict_pre_hooks_are_honoured_and_none_is_left_behind():
    param, optimizer = make(dtype=torch.bfloat16)
    advance(param, optimizer)

    def double(_, state_dict):
        state_dict["state"] = {k: {**v, "exp_avg": v["exp_avg"].float() * 2} for k, v in state_dict["state"].items()}
        return state_dict

    twin = nn.Parameter(param.detach().clone())
    restored = PAdam([twin], **OPTIONS)
    restored.register_load_state_dict_pre_hook(double)
    restored.load_state_dict(optimizer.state_dict())
    assert torch.equal(restored.state[twin]["exp_avg"], optimizer.state[param]["exp_avg"].float() * 2)
    assert len(restored._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_continue_identically(duplicate):
    param, optimizer = make(backend="eager")
    advance(param, optimizer)
    twin = duplicate(optimizer)
    assert twin.backend == "eager"
    twin_param = twin.param_groups[0]["params"][0]
    advance(param, optimizer, seed=2)
    advance(twin_param, twin, seed=2)
    assert torch.equal(param, twin_param)


def test_hyperparameters_are_group_keys_and_follow_schedules():
    a, b = (nn.Parameter(torch.full((4,), 0.5)) for _ in range(2))
    optimizer = PAdam([{"params": [a], "lambda_p": 0.0}, {"params": [b], "p_norm": 1.0, "lr": 0.1}], **OPTIONS)
    assert optimizer.param_groups[0]["lambda_p"] == 0.0
    assert optimizer.param_groups[1]["p_norm"] == 1.0
    assert optimizer.param_groups[0]["p_norm"] == 0.8
    a.grad, b.grad = torch.zeros(4), torch.zeros(4)
    optimizer.step()
    assert torch.equal(a, torch.full((4,), 0.5))
    assert torch.allclose(b, torch.full((4,), 0.5 / (1 + 0.1 * 0.05 / 0.5)))
    optimizer.param_groups[1]["lambda_p"] = 5.0  # as a schedule would
    before = b.detach().clone()
    optimizer.step()
    assert torch.allclose(b, before / (1 + 0.1 * 5.0 / before))
    saved = optimizer.state_dict()
    optimizer.param_groups[1]["lambda_p"] = 0.0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["lambda_p"] == 5.0


def test_an_lr_scheduler_drives_it():
    param, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    advance(param, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(OPTIONS["lr"] * 0.28)


def test_add_param_group_after_training_has_begun():
    param, optimizer = make()
    advance(param, optimizer)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lambda_p": 0.0})
    late.grad = torch.ones(3)
    advance(param, optimizer, 1)
    assert optimizer.state[late]["step"] == 1  # its own bias correction, beside tensors at step 4
    assert torch.allclose(late, torch.ones(3) - OPTIONS["lr"])


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    param, optimizer = make()
    with pytest.raises(ValueError, match="p_norm=inf"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "p_norm": float("inf")})
    assert len(optimizer.param_groups) == 1
    advance(param, optimizer)


def test_a_group_where_the_backend_cannot_run_is_not_kept(monkeypatch):
    from hf_padam.optim.backends import compiled

    param, optimizer = make(backend="compiled")
    monkeypatch.setattr(compiled, "unavailable", lambda device: "no C++ compiler was found")
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1


def test_parameters_swapped_in_the_groups_before_the_first_step():
    """As accelerate does for FSDP2."""
    param, optimizer = make()
    swapped = nn.Parameter(param.detach().clone())
    optimizer.param_groups[0]["params"] = [swapped]
    advance(swapped, optimizer)
    assert set(optimizer.state) == {swapped}
    assert not torch.equal(swapped, param)


def test_a_state_dict_round_trip_before_the_first_step_changes_nothing():
    """As accelerate's prepare() does."""
    param, optimizer = make()
    reference, plain = make()
    optimizer.load_state_dict(optimizer.state_dict())
    advance(param, optimizer)
    advance(reference, plain)
    assert torch.equal(param, reference)


def test_missing_gradients_and_frozen_parameters_are_skipped():
    trained, missing = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = PAdam([trained, missing, frozen], **OPTIONS)
    trained.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(trained, torch.ones(3))
    assert torch.equal(missing, torch.ones(3)) and torch.equal(frozen, torch.ones(3))
    assert set(optimizer.state) == {trained}


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    param, optimizer = make()

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_any_memory_layout_gives_the_same_result(backend):
    if backend == "compiled":
        pytest.importorskip("torch._inductor")
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    layouts = {
        "contiguous": base.clone(),
        "transposed": base.t().contiguous().t(),
        "strided": torch.zeros(6, 16)[:, ::2].copy_(base),
        "unaligned": torch.zeros(49)[1:].view(6, 8).copy_(base),
    }
    results = {}
    for name, tensor in layouts.items():
        param = nn.Parameter(tensor)
        optimizer = PAdam([param], backend=backend, **OPTIONS)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            param.grad = torch.randn(6, 8, generator=generator)
            optimizer.step()
        results[name] = param.detach().clone()
    for name, result in results.items():
        torch.testing.assert_close(result, results["contiguous"], rtol=1e-6, atol=1e-8, msg=name)


def test_scalars_and_empty_tensors_are_fine():
    scalar, empty = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(0, 3))
    optimizer = PAdam([scalar, empty], **OPTIONS)
    scalar.grad, empty.grad = torch.tensor(1.0), torch.zeros(0, 3)
    optimizer.step()
    assert scalar.item() < 0.5


def test_sparse_gradients_are_refused_before_anything_changes():
    embedding = nn.Embedding(5, 3, sparse=True)
    other = nn.Parameter(torch.ones(3))
    optimizer = PAdam([other, *embedding.parameters()], **OPTIONS)
    (embedding(torch.tensor([1])).sum() + other.sum()).backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3)) and len(optimizer.state) == 0


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2fnuz], ids=str)
def test_dtypes_that_no_step_can_change_are_refused_when_they_are_given(dtype):
    weight = nn.Parameter(torch.ones(2).to(dtype))
    with pytest.raises(ValueError, match=f"{dtype}.*leave others out"):
        PAdam([weight])
    with pytest.raises(ValueError, match=f"{dtype}.*leave it out of params"):
        add_pnorm_decay(torch.optim.Adam([weight]))


def test_a_tensor_that_starts_at_zero_is_refused_by_name():
    named = [("head.weight", nn.Parameter(torch.zeros(3, 2)))]
    with pytest.raises(ValueError, match=r"head\.weight.*\(3, 2\).*all zeros.*lambda_p=0"):
        PAdam(named, p_norm=0.8, lambda_p=0.1)
    PAdam(named, p_norm=2.0, lambda_p=0.1)  # zero does not absorb for p = 2
    PAdam(named, lambda_p=0.0)
    PAdam(named, late_decay=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1e-3), ("lr", float("nan")), ("lr", float("inf")), ("lr", "1e-3"),
        ("betas", (0.9,)), ("betas", (1.0, 0.999)), ("betas", (0.9, -0.1)), ("betas", 0.9),
        ("eps", 0.0), ("eps", -1e-8), ("eps", 1e-50),
        ("importance", "wanda"), ("importance", None), ("p_norm", "0.8"),
            ("p_norm", float("inf")), ("p_norm", float("nan")), ("p_norm", True),
        ("lambda_p", -0.1), ("lambda_p", float("nan")), ("lambda_p", None),
        ("weight_decay", -0.1), ("weight_decay", float("inf")),
        ("late_decay", 1), ("s_rate", 0.0), ("s_rate", 1.5), ("s_rate", float("nan")), ("s_rate", "1"),
        ("s_rate", 1 - 1e-9), ("s_rate", 1e-40),
        ("backend", "cuda"),
    ],
)  # fmt: skip
def test_every_hyperparameter_is_validated(name, value):
    with pytest.raises(ValueError, match=name):
        PAdam([nn.Parameter(torch.ones(2))], **{name: value})


def test_a_hyperparameter_spoilt_during_training_is_caught():
    param, optimizer = make()
    optimizer.param_groups[0]["lambda_p"] = float("nan")
    with pytest.raises(ValueError, match="lambda_p=nan"):
        advance(param, optimizer, 1)


def test_nan_gradients_show_instead_of_being_decayed_away():
    param = nn.Parameter(torch.tensor([0.0, 0.5]))
    optimizer = PAdam([param], **OPTIONS)
    param.grad = torch.tensor([float("nan"), float("nan")])
    optimizer.step()
    assert param.isnan().all()


def test_auto_takes_eager_for_small_models_and_says_so_without_a_compiler(monkeypatch, caplog):
    from hf_padam.optim import backends
    from hf_padam.optim.backends import compiled, eager

    cpu = torch.device("cpu")
    assert backends.select("auto", cpu, 1000) is eager
    monkeypatch.setattr(compiled, "unavailable", lambda device: "no C++ compiler was found")
    backends._say_that_eager_runs.cache_clear()
    assert backends.select("auto", cpu, 10**9) is eager
    assert backends.select("auto", cpu, 10**9) is eager
    assert sum("no C++ compiler" in record.message for record in caplog.records) == 1
    with pytest.raises(RuntimeError, match='backend="compiled" cannot run.*no C\\+\\+ compiler'):
        backends.select("compiled", cpu, 10**9)
    backends._say_that_eager_runs.cache_clear()


def test_groups_saved_before_an_option_existed_get_its_default():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = PAdam([param])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["bf16_stochastic_round"], group["rounding_seed"], group["late_decay"], group["s_rate"]
    optimizer.load_state_dict(state)
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[0]["bf16_stochastic_round"] is False
    assert optimizer.param_groups[0]["s_rate"] == 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_goes_on_from_a_state_of_adam(kind):
    weights = [torch.randn(6, 4), torch.randn(5)]
    earlier = [nn.Parameter(weight.clone()) for weight in weights]
    params = [nn.Parameter(weight.clone()) for weight in weights]
    groups = [{"params": params[:1], "p_norm": 0.5, "importance": "fisher"}, {"params": params[1:], "lambda_p": 0.0}]
    optimizer = PAdam(groups, lr=1e-3, lambda_p=0.3)
    adam = kind([{"params": [param]} for param in earlier], lr=1e-2, betas=(0.8, 0.95), weight_decay=0.0)
    for step in range(3):
        for param, own in zip(earlier, params, strict=True):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
            own.grad = param.grad.clone()
        if step == 2:
            with torch.no_grad():
                for param, own in zip(earlier, params, strict=True):
                    own.copy_(param)
            optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
            optimizer.step()
        adam.step()
    first, second = optimizer.param_groups
    assert (first["p_norm"], first["lambda_p"], first["importance"]) == (0.5, 0.3, "fisher")
    assert (second["p_norm"], second["lambda_p"], second["importance"]) == (0.8, 0.0, "magnitude")
    assert (first["lr"], first["betas"]) == (1e-2, (0.8, 0.95))
    for param, own in zip(earlier, params, strict=True):  # under "fisher" nothing decays in the first steps
        torch.testing.assert_close(own, param)
        assert optimizer.state[own]["step"] == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adamax, torch.optim.RMSprop])
def test_a_state_of_an_optimizer_without_these_moments_is_refused(kind):
    params = [nn.Parameter(torch.randn(6, 4))]
    other = kind(params, lr=1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    params[0].grad = torch.ones(6, 4)
    other.step()
    optimizer = PAdam(params)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="it is of another optimizer. PAdam goes on from its own states"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("target", [None, 0.5])
def test_a_compiled_step_is_the_step(target):
    """As PyTorch's recipe for compiling optimizers has it; what is compiled calls ours."""
    weights = []
    for compiles in (False, True):
        param = nn.Parameter(torch.linspace(-1, 1, 64))
        optimizer = PAdam([param], lr=1e-2, p_norm=0.5)
        if target:
            TargetSparsity(optimizer, target, 20)
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for number in range(20):
            param.grad = torch.randn(64, generator=torch.Generator().manual_seed(number))
            step()
        weights.append(param.detach())
    assert torch.equal(*weights)


def test_a_first_step_for_which_there_is_no_memory_can_be_taken_again(monkeypatch):
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = PAdam([param], lr=1e-2)
    make, calls = optimizer._new_moment, []

    def scarce(param, name):
        calls.append(name)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return make(param, name)

    monkeypatch.setattr(optimizer, "_new_moment", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["step"] == 1 and (param < 1).all()


def test_what_adams_states_hold_besides_is_refused_or_left(caplog):
    param = nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    adam = torch.optim.AdamW([param], amsgrad=True)
    adam.step()
    optimizer = PAdam([param])
    optimizer.load_state_dict(adam.state_dict())
    assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq"}
    other = torch.optim.AdamW([param], maximize=True)
    other.step()
    with pytest.raises(ValueError, match="maximize=True, and PAdam minimizes"):
        optimizer.load_state_dict(other.state_dict())


def test_hard_pruning_without_a_target_is_not_done_in_silence(caplog):
    importance._warn_of_pruning.cache_clear()
    param = nn.Parameter(torch.tensor([0.5, 2.0]))
    param.grad = torch.ones(2)
    PAdam([param], p_norm=-math.inf).step()
    assert param[0] == 0 < param[1] and "zeroes every weight whose size is below 1" in caplog.text
