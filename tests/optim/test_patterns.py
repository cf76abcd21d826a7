"""N:M patterns: what dies in every block, on the way and in the end, and where blocks are not whole."""

from __future__ import annotations

import pytest
import torch
from conftest import blocks, tiny_gpt2, tiny_llama
from patterned import STEPS, Model, train, weights
from processes import job
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_padam import PAdam, PAdamTrainer, PAdamTrainingArguments, TargetSparsity, decayed_parameters, get_param_groups
from hf_padam.optim.patterns import PATTERN, check_blocks
from hf_padam.optim.target_sparsity import steering_of


def zeros_of(weight: torch.Tensor, m: int, dim: int = -1) -> torch.Tensor:
    """How many zeros each block has."""
    return (weight.detach().movedim(dim, -1).reshape(-1, m) == 0).sum(1)


def arguments(directory, cls=PAdamTrainingArguments, **options):
    common = dict(output_dir=str(directory), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    return cls(**common | dict(optim="padam", learning_rate=1e-3, max_steps=20, logging_steps=5) | options)


def input_dim(model: nn.Module, name: str) -> int:
    module = model.get_submodule(name.rpartition(".")[0])
    return -2 if isinstance(module, Conv1D) or getattr(module, "is_transposed", False) else -1


def mixtral():
    torch.manual_seed(0)
    common = dict(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return MixtralForCausalLM(MixtralConfig(**common, num_key_value_heads=1, num_local_experts=3))


def gpt_oss():
    torch.manual_seed(0)
    common = dict(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return GptOssForCausalLM(
        GptOssConfig(**common, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    )


@pytest.mark.parametrize(("pattern", "dead", "m"), [("2:4", 2, 4), ("1:4", 3, 4), ("4:8", 4, 8), ("3:4", 1, 4)])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, mixtral, gpt_oss])
def test_every_block_along_the_inputs_ends_with_its_zeros(build, pattern, dead, m):
    model = build()
    dense = None if build in (tiny_llama, tiny_gpt2) else r".*(self_attn|gate|router)"
    groups = get_param_groups(model, importance="magnitude", target_pattern=pattern, dense_modules=dense)
    optimizer = PAdam(groups, lr=1e-3)
    steering = TargetSparsity(optimizer, None, 6, start=0.0, end=0.5)
    data = torch.tensor([row["input_ids"] for row in blocks()[:2]])
    shares = []
    for _ in range(6):
        model(input_ids=data, labels=data).loss.backward()
        optimizer.step()
        shares.append(steering.state()["sparsity"])
    decayed = decayed_parameters(model, dense_modules=dense)
    assert decayed and steering.met and shares == sorted(shares) and 0 < shares[0] < shares[1] < dead / m
    for name, param in decayed.items():
        assert (zeros_of(param, m, input_dim(model, name)) == dead).all(), name
    assert shares[-1] == steering.target == steering.state()["planned_sparsity"] == pytest.approx(dead / m, abs=1e-12)


@pytest.mark.parametrize("importance", ["magnitude", "fisher"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("optim", ["padam", "padam_8bit"])
def test_a_trainer_meets_the_pattern_with_every_importance(tmp_path, importance, scope, optim):
    options = dict(target_pattern="2:4", importance=importance, target_scope=scope, optim=optim)
    trainer = PAdamTrainer(model=tiny_llama(), args=arguments(tmp_path, **options), train_dataset=blocks())
    trainer.train()
    assert all((zeros_of(param, 4) == 2).all() for param in decayed_parameters(trainer.model).values())
    assert trainer.sparsity()["sparsity"] == 0.5 == steering_of(trainer.optimizer).target


def test_a_plain_trainer_takes_the_pattern_in_optim_args(tmp_path):
    args = arguments(tmp_path, TrainingArguments, optim_args="target_pattern=2:4, target_end=0.5")
    trainer = Trainer(model=tiny_gpt2(), args=args, train_dataset=blocks())
    trainer.train()
    for name, param in decayed_parameters(trainer.model).items():
        assert (zeros_of(param, 4, input_dim(trainer.model, name)) == 2).all(), name


def test_the_smallest_of_each_block_die_and_ties_are_no_exception():
    weight = torch.tensor([[4.0, -1.0, 3.0, 2.0, 1.0, 1.0, -1.0, 1.0], [0.0, 5.0, 0.0, 6.0, 0.0, 0.0, 0.0, 7.0]])
    param = nn.Parameter(weight.clone())
    optimizer = PAdam([{"params": [param], "target_sparsity": 0.5, PATTERN: "2:4"}], lr=1e-9, p_norm=-torch.inf)
    steering = TargetSparsity(optimizer, None, 1)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param[0, :4] == 0, torch.tensor([False, True, False, True]))
    assert zeros_of(param, 4).tolist() == [2, 2, 2, 3]  # the last began with three
    state = steering.state()
    assert state["sparsity"] == state["planned_sparsity"] == 9 / 16 and steering.met


def test_weights_without_a_gradient_keep_the_pattern_by_magnitude():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(6, 8))
    before = param.detach().clone()
    group = {"params": [param], "target_sparsity": 0.5, PATTERN: "2:4"}
    optimizer = PAdam([group], lr=1e-3, p_norm=-torch.inf, importance="fisher")
    TargetSparsity(optimizer, None, 20)
    for _ in range(20):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    kept = before.reshape(-1, 4).abs().topk(2).indices
    assert torch.equal((param.reshape(-1, 4) != 0).nonzero()[:, 1].view(-1, 2), kept.sort().values)


def test_a_run_under_a_pattern_goes_on_exactly(tmp_path):
    def trainer(directory):
        options = dict(target_pattern="2:4", save_strategy="steps", save_steps=6, max_steps=12)
        return PAdamTrainer(model=tiny_gpt2(), args=arguments(directory, **options), train_dataset=blocks())

    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_pattern": "4:2"}, "'4:2' is no N:M pattern such as 2:4, with 0 < N < M"),
        ({"target_pattern": "0:4"}, "'0:4' is no N:M pattern"),
        ({"target_pattern": "half"}, "target_pattern='half' must be a pattern such as 2:4"),
        ({"target_pattern": 124}, "target_pattern=124 must be a pattern such as 2:4 .in quotes in a YAML file"),
        ({"target_pattern": "2:4", "target_sparsity": 0.5}, "exclude each other: the pattern says the share"),
        ({"target_pattern": "2:4", "lambda_p": 0.1}, "target_pattern='2:4' and lambda_p=0.1 exclude each other"),
        ({"target_pattern": "2:4", "p_norm": 0.5}, "p_norm=0.5 has no effect on target_pattern='2:4'"),
        ({"target_pattern": "2:4", "late_decay": True}, "late_decay=True exclude each other"),
        ({"target_pattern": "2:4", "optim": "adamw_torch"}, "target_pattern='2:4' is an option of padam"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_pattern_is_refused_before_anything_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_blocks_that_are_not_whole_are_refused_by_name(tmp_path):
    model = tiny_llama(intermediate_size=66)
    with pytest.raises(ValueError, match=r"mlp.down_proj.weight, of shape \(32, 66\), which has 66 inputs"):
        PAdamTrainer(model=model, args=arguments(tmp_path, target_pattern="2:4"), train_dataset=blocks()).train()
    vector = {"params": [nn.Parameter(torch.ones(8))], PATTERN: "2:4"}
    with pytest.raises(ValueError, match="is no matrix"):
        check_blocks(vector)


def test_a_matrix_whose_inputs_are_unknown_is_refused_by_name():
    class Experts(nn.Module):  # a stack of them, which does not say how it multiplies
        def __init__(self):
            super().__init__()
            self.config, self.num_experts = None, 3
            self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 16))
            self.down_proj = nn.Parameter(torch.randn(3, 16, 8))

    model = nn.Sequential(nn.Linear(8, 8), Experts())
    assert "1.gate_up_proj" in decayed_parameters(model)
    with pytest.raises(ValueError, match="target_pattern does not go with 1.gate_up_proj: which of its dimensions"):
        get_param_groups(model, target_pattern="2:4")
    get_param_groups(model, target_pattern="2:4", target_modules=["0"])


def test_shards_along_other_dimensions_have_the_zeros_of_one_process(tmp_path):
    for importance in ("magnitude", "fisher"):
        model = Model()
        train(model, importance)
        assert all((zeros_of(weight, 4) == 2).all() for weight in weights(model).values()) and STEPS > 10
        torch.save(weights(model), tmp_path / f"{importance}.pt")
    result = job(2, "optim/patterned.py", tmp_path)
    assert all(difference < 1e-5 for difference in result["differences"].values()), result
    assert "sharded along its inputs" in result["errors"]["rows"]
    assert "flattened by its sharding" in result["errors"]["fsdp1"]
