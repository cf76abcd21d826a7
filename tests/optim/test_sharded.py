"""Every way of sharding that torch has, in two real processes, takes the steps of one; checkpoints go both ways."""

from __future__ import annotations

import pytest
import torch
from processes import job
from sharded import (
    STEPS,
    WAYS_TO_ZEROS,
    OddModel,
    load,
    optimizer_for,
    save,
    scale_of_pieces,
    train,
    train_to_zeros,
)

from hf_padam.sparsity import count_model_zeros, summarize

# Fewer rows are summed at a time, or in another order: rounding of 1e-7 in the gradients, over 20 steps of 1e-2.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One process trains 20 steps, and leaves a checkpoint of the first 10; two processes carry on from there."""
    directory = tmp_path_factory.mktemp("sharded")
    model = OddModel()
    optimizer = optimizer_for(model)
    train(model, optimizer, 0, STEPS // 2)
    save(directory / "one", model, optimizer)
    train(model, optimizer, STEPS // 2)
    torch.save({name: param.detach() for name, param in model.named_parameters()}, directory / "whole.pt")
    shares = {}
    for case, options in WAYS_TO_ZEROS.items():
        sparse = OddModel()
        shares[case] = train_to_zeros(sparse, **options)
        weights = {name: param.detach() for name, param in sparse.named_parameters()}
        torch.save(weights, directory / f"{case.replace('/', '_')}.pt")
    return directory, model, optimizer, shares, job(2, "optim/sharded.py", directory)


@pytest.mark.parametrize("way", ["fully_shard", "fsdp1", "tensor_parallel"])
def test_sharded_steps_are_those_of_one_process(trained, way):
    _, model, *_, result = trained
    assert result["differences"][way] < TOLERANCE
    decayed = [name for name, _ in model.named_parameters() if name.endswith(".weight")]
    expected = summarize(count_model_zeros(model, decayed))
    assert result["sparsities"][way] == expected
    assert expected["sparsity"] > 0.05
    assert result["shards_of_last"] == [14, 0], "one process has nothing of the last layer"


@pytest.mark.parametrize("case", WAYS_TO_ZEROS)
@pytest.mark.parametrize("way", ["fully_shard", "fsdp1", "tensor_parallel"])
def test_targets_and_the_unit_of_importance_are_of_all_shards(trained, way, case):
    *_, shares, result = trained
    share, difference = result["zeros"][f"{case}, {way}"]
    assert share == shares[case] > 0.05
    assert share == pytest.approx(WAYS_TO_ZEROS[case]["target"] or share, abs=0.01)
    assert difference < TOLERANCE


def test_what_torch_saves_for_fsdp2_and_loads_into_new_groups_goes_on_exactly(trained):
    """The steps and the target that steering has reached, and the scale of importance, are with them on all shards."""
    *_, result = trained
    assert result["resumed"] == dict.fromkeys(["sharded, None", "sharded, 0.5", "full, None", "full, 0.5"], 0.0)


def test_parameters_that_fsdp1_flattened_are_refused(trained):
    assert "fsdp_use_orig_params: true" in trained[-1]["refusal"]


def test_a_tensor_of_zeros_is_refused_under_zero3_too(trained):
    assert "parameter head" in trained[-1]["zero3_refusal"] and "all zeros" in trained[-1]["zero3_refusal"]


def test_pieces_of_deepspeed_are_measured_in_one_unit_or_not_at_all(trained):
    scale, refusal = trained[-1]["pieces"]
    assert (pytest.approx(scale, rel=1e-6), "") == scale_of_pieces()
    assert "sub_group_size" in refusal
    scale, refusal = trained[-1]["apart"]  # tensors of their own, where DeepSpeed is not in use
    assert scale != pytest.approx(scale_of_pieces()[0], rel=1e-2) and not refusal


def test_a_checkpoint_of_one_process_goes_on_in_two(trained):
    *_, result = trained
    assert result["differences"]["from_one"] < TOLERANCE
    assert result["step_is_a_cpu_scalar"]


def test_a_checkpoint_of_two_processes_goes_on_in_one(trained):
    directory, whole, reference, *_ = trained
    model = OddModel()
    optimizer = optimizer_for(model, lr=123.0)
    for group in optimizer.param_groups:
        group |= {"p_norm": 1.5, "lambda_p": 7.0}
    load(directory / "two", model, optimizer)
    for group, expected in zip(optimizer.param_groups, reference.param_groups, strict=True):
        for key in ("lr", "betas", "eps", "p_norm", "lambda_p", "weight_decay"):
            assert group[key] == pytest.approx(expected[key]), key
    assert optimizer.state[model.gain]["step"].item() == STEPS // 2
    train(model, optimizer, STEPS // 2)
    for (name, param), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_torch_does_to_create_state_changes_no_weight(dtype):
    """Before a state can be loaded, torch takes a step with gradients of zero at lr = 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = OddModel().to(dtype)
    with torch.no_grad():
        model.second.weight[0] = 1e-6  # would die in any step with lr > 0
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = optimizer_for(model, lr=1.0)
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0] * 4
    moments = {state["exp_avg"].dtype for state in optimizer.state.values()}
    assert moments == {torch.float32 if dtype == torch.float16 else dtype}
