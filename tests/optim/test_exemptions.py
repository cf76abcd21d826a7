"""Parameter groups that were made for AdamW: what they exempt from weight decay, a p-norm decay spares too."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import tiny_llama
from torch import nn

from hf_padam import PAdam, add_pnorm_decay, get_param_groups


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))


def two_groups(**exempt) -> list[dict]:
    """As in countless scripts."""
    parameters = dict(model().named_parameters())
    matrices = [p for name, p in parameters.items() if name in ("0.weight", "2.weight")]
    others = [p for name, p in parameters.items() if name not in ("0.weight", "2.weight")]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0} | exempt]


@pytest.mark.parametrize("reverse", [False, True], ids=["decayed first", "decayed last"])
def test_a_group_without_weight_decay_beside_one_with_it_is_spared(reverse, caplog):
    groups = two_groups()[::-1] if reverse else two_groups()
    optimizer = PAdam(iter(groups), lambda_p=0.3)
    assert {g["weight_decay"]: g["lambda_p"] for g in optimizer.param_groups} == {0.1: 0.3, 0.0: 0.0}
    assert not caplog.records


def test_other_optimizers_spare_it_too():
    optimizer = torch.optim.AdamW(two_groups(), weight_decay=0.01)
    add_pnorm_decay(optimizer, lambda_p=0.3)
    assert [group["lambda_p"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_a_group_that_gives_lambda_p_speaks_for_itself():
    optimizer = PAdam(two_groups(lambda_p=0.2), lambda_p=0.3, p_norm=2)
    assert [group["lambda_p"] for group in optimizer.param_groups] == [0.3, 0.2]


def test_a_default_weight_decay_counts():
    groups = two_groups()
    del groups[0]["weight_decay"]
    assert [g["lambda_p"] for g in PAdam(groups, weight_decay=0.1, lambda_p=0.3).param_groups] == [0.3, 0.0]


@pytest.mark.parametrize(("more", "lambda_p"), [({}, 0.0), ({"weight_decay": 0.1}, 0.3), ({"lambda_p": 0.2}, 0.2)])
def test_a_group_that_is_added_later_is_spared_alike(more, lambda_p):
    optimizer = PAdam(two_groups()[:1], lambda_p=0.3)
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(4, 4)), "weight_decay": 0.0} | more)
    assert [group["lambda_p"] for group in optimizer.param_groups] == [0.3, lambda_p]


def test_so_it_is_with_a_decay_that_was_added_to_another_optimizer():
    optimizer = torch.optim.AdamW(two_groups()[:1])
    add_pnorm_decay(optimizer, p_norm=0.5, lambda_p=0.3)
    for weight_decay in (0.0, 0.1):
        optimizer.add_param_group({"params": nn.Parameter(torch.ones(4, 4)), "weight_decay": weight_decay})
    optimizer.step()
    assert [group["lambda_p"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_where_no_group_is_exempt_all_decay_and_vectors_are_warned_of(weight_decay, caplog):
    groups = [group | {"weight_decay": weight_decay} for group in two_groups()]
    groups[1]["params"] = [p for p in groups[1]["params"] if p.any()]  # a bias of zeros is refused as ever
    with caplog.at_level(logging.WARNING):
        optimizer = PAdam(groups, lambda_p=0.3)
    assert [group["lambda_p"] for group in optimizer.param_groups] == [0.3, 0.3]
    (record,) = caplog.records
    assert "3 tensors of one dimension" in record.message and "get_param_groups" in record.message


def test_the_warning_names_what_has_a_name(caplog):
    PAdam([(name, param) for name, param in tiny_llama().named_parameters() if param.any()])
    assert "model.layers.0.input_layernorm.weight" in caplog.text


@pytest.mark.parametrize("params", ["proper groups", "matrices only", "vectors only", "no decay", "p is 2"])
def test_there_is_no_warning_without_need(params, caplog):
    llama = tiny_llama()
    named = [(name, param) for name, param in llama.named_parameters() if param.any()]
    if params == "proper groups":
        PAdam(get_param_groups(llama))
    elif params == "matrices only":
        PAdam([param for _, param in named if param.dim() == 2])
    elif params == "vectors only":
        PAdam([param for _, param in named if param.dim() == 1])
    else:
        PAdam(named, **({"lambda_p": 0.0} if params == "no decay" else {"p_norm": 2.0}))
    assert not caplog.records
