"""PAdam with 8-bit moments: the same update, a quarter of the state, saved and resumed exactly."""

import contextlib
import sys

import pytest
import torch
from conftest import tiny_llama
from transformers import Trainer, TrainingArguments

from hf_padam import PAdam, PAdam8bit
from hf_padam.optim.backends import eager
from hf_padam.optim.eight_bit import SMALLEST, check_installed
from hf_padam.optim.update import prepare

try:
    check_installed()
except ImportError:
    pytest.skip("runs where torchao is installed", allow_module_level=True)

HYPERPARAMETERS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, p_norm=0.8, lambda_p=0.05, weight_decay=0.01)
SHAPES = ((128, 96), (33, 256), (64, 64), (7,), (4097,))


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((torch.randn(shape, generator=generator) / 10).to(dtype)) for shape in SHAPES]


def train(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) / 10).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("slice_", [2**22, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_is_padams_on_the_unpacked_moments(dtype, slice_, monkeypatch):
    monkeypatch.setattr("hf_padam.optim.eight_bit._SLICE", slice_)
    params = parameters(dtype)
    optimizer = PAdam8bit(params, **HYPERPARAMETERS, backend="eager")
    train(optimizer, params, range(3))
    expected = []
    for param in params:
        state = optimizer.state[param]
        moments = [state[name].dequantize() if param.numel() % 256 == 0 else state[name].clone()
                   for name in ("exp_avg", "exp_avg_sq")]  # fmt: skip
        expected.append([param.detach().clone(), *moments])
    train(optimizer, params, [3])
    scalars = prepare(4, **HYPERPARAMETERS)
    for param, (weight, first, second) in zip(params, expected, strict=True):
        eager.step([weight], [param.grad], [first], [second], scalars)
        torch.testing.assert_close(param.detach(), weight, rtol=0, atol=0)
        state = optimizer.state[param]
        if param.numel() % 256 == 0:
            # Half of the widest gap between neighbouring codes, relative to the block's largest value, and some.
            for got, exact in ((state["exp_avg"], first), (state["exp_avg_sq"], second)):
                error = (got.dequantize() - exact).view(-1, 256).abs().amax(1) / exact.view(-1, 256).abs().amax(1)
                assert 0 < error.max() < 0.01


def test_a_second_moment_that_eight_bits_round_to_zero_is_no_missing_gradient():
    """Under "fisher" weights without a gradient so far are spared; the least important ones must not be."""
    param = torch.nn.Parameter(torch.ones(SMALLEST))
    optimizer = PAdam8bit([param], **HYPERPARAMETERS | {"importance": "fisher"}, backend="eager")
    for _ in range(3):
        param.grad = torch.full((SMALLEST,), 1e-6)
        param.grad[::256], param.grad[1::256] = 1.0, 0.0
        optimizer.step()
    second = optimizer.state[param]["exp_avg_sq"].dequantize().view(-1, 256)
    assert (second[:, 1] == 0).all()
    assert (second[:, 2:] > 0).all() and (second[:, 2:] < 1e-6 * second[:, :1]).all()

    full = PAdam([param], **HYPERPARAMETERS, backend="eager")
    full.step()
    optimizer.load_state_dict(full.state_dict())  # packs the moments
    assert (optimizer.state[param]["exp_avg_sq"].dequantize() > 0).sum() == SMALLEST * 255 // 256


def test_state_takes_two_bytes_a_parameter():
    param = torch.nn.Parameter(torch.randn(1024, 1024))
    optimizer = PAdam8bit([param], **HYPERPARAMETERS)
    train(optimizer, [param], [0])
    moments = [optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")]
    stored = sum(t.nbytes for moment in moments for t in (moment.codes, moment.scale, moment.qmap))
    assert stored / param.numel() < 2.05


def test_small_and_uneven_tensors_keep_full_moments():
    params = parameters()
    optimizer = PAdam8bit(params, **HYPERPARAMETERS)
    train(optimizer, params, [0])
    packed = [hasattr(optimizer.state[param]["exp_avg"], "codes") for param in params]
    assert packed == [True, True, True, False, False]
    assert SMALLEST == 64 * 64


def test_strided_weights_are_stepped_in_place():
    base = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    results = []
    for weight in (base.clone().t(), base.t().contiguous()):
        param = torch.nn.Parameter(weight)
        train(PAdam8bit([param], **HYPERPARAMETERS, backend="eager"), [param], range(2))
        results.append(param.detach().contiguous())
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_ends_near_full_precision_with_the_same_zeros(dtype):
    ends = []
    for cls in (PAdam, PAdam8bit):
        params = parameters(dtype)
        optimizer = cls(params, **HYPERPARAMETERS, bf16_stochastic_round=dtype == torch.bfloat16)
        train(optimizer, params, range(60))
        ends.append(torch.cat([param.detach().flatten() for param in params]).float())
    full, packed = ends
    zeros = [(end == 0).float().mean().item() for end in ends]
    assert 0.2 < zeros[0] < 0.95 and zeros[1] == pytest.approx(zeros[0], abs=0.03)
    assert torch.corrcoef(torch.stack(ends))[0, 1] > (0.95 if dtype == torch.float32 else 0.9)


def test_a_saved_state_continues_with_the_same_weights(tmp_path):
    params = parameters()
    optimizer = PAdam8bit(params, **HYPERPARAMETERS)
    train(optimizer, params, range(3))
    torch.save([[p.detach() for p in params], optimizer.state_dict()], tmp_path / "saved.pt")
    train(optimizer, params, range(3, 6))
    weights, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = [torch.nn.Parameter(weight) for weight in weights]
    other = PAdam8bit(resumed, lr=1.0)
    other.load_state_dict(state)
    assert hasattr(other.state[resumed[0]]["exp_avg"], "codes")
    train(other, resumed, range(3, 6))
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)


def test_full_moments_are_packed_on_loading_and_the_reverse_is_refused():
    params = parameters()
    full = PAdam(params, **HYPERPARAMETERS)
    train(full, params, range(3))
    packed = PAdam8bit(params, lr=1.0)
    packed.load_state_dict(full.state_dict())
    state, before = packed.state[params[0]], full.state[params[0]]
    assert state["step"] == 3 and state["exp_avg"].codes.dtype == torch.uint8
    torch.testing.assert_close(state["exp_avg"].dequantize(), before["exp_avg"], rtol=0.1, atol=1e-4)
    with pytest.raises(ValueError, match="padam_8bit"):
        full.load_state_dict(packed.state_dict())


def test_the_plain_trainer_resumes_it_exactly(tmp_path):
    def args(**options):
        return TrainingArguments(
            str(tmp_path), optim="padam_8bit", optim_args="p_norm=0.8,lambda_p=0.5", learning_rate=3e-3, max_steps=6,
            save_steps=3, per_device_train_batch_size=2, report_to="none", use_cpu=True, **options,
        )  # fmt: skip

    data = [dict(input_ids=(ids := [(3 * i + j) % 60 + 1 for j in range(16)]), labels=ids) for i in range(32)]
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        torch.manual_seed(0)
        trainer = Trainer(model=tiny_llama(hidden_size=64), args=args(), train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        assert type(trainer.optimizer.optimizer) is PAdam8bit
        ends.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    states = trainer.optimizer.optimizer.state.values()
    assert any(hasattr(state["exp_avg"], "codes") for state in states)
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


def test_s_of_its_own_is_refused_before_and_during_training(tmp_path):
    from hf_padam import PAdamTrainingArguments

    with pytest.raises(ValueError, match=r"s_rate=0.5 is not allowed with 8-bit moments.*optim=\"padam\""):
        PAdam8bit(parameters(), s_rate=0.5)
    with pytest.raises(ValueError, match="s_rate=0.5 is not allowed with 8-bit moments"):
        PAdamTrainingArguments(str(tmp_path), optim="padam_8bit", s_rate=0.5, use_cpu=True)
    params = parameters()
    optimizer = PAdam8bit(params, late_decay=True)
    train(optimizer, params, [0])
    optimizer.param_groups[0] |= {"late_decay": False, "s_rate": 0.5}
    with pytest.raises(ValueError, match="s_rate=0.5 is not allowed with 8-bit moments"):
        train(optimizer, params, [1])


def test_without_torchao_the_arguments_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim.subclass_8bit", None)
    from hf_padam import PAdamTrainingArguments

    with pytest.raises(ImportError, match=r"pip install \"hf-padam\[8bit\]\""):
        PAdamTrainingArguments(str(tmp_path), optim="padam_8bit", use_cpu=True)
    with pytest.raises(ImportError, match="need torchao"):
        PAdam8bit(parameters())


def test_a_full_fsdp_state_is_refused_before_training(tmp_path, monkeypatch):
    from hf_padam import PAdamTrainingArguments

    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        own = {"fsdp": True, "fsdp_config": {"state_dict_type": kind}}
        refused = pytest.raises(ValueError, match="SHARDED_STATE_DICT") if kind[0] == "F" else contextlib.nullcontext()
        with refused:
            PAdamTrainingArguments(str(tmp_path), optim="padam_8bit", use_cpu=True, **own)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    with pytest.raises(ValueError, match="SHARDED_STATE_DICT"):
        PAdamTrainingArguments(str(tmp_path), optim="padam_8bit", use_cpu=True)
