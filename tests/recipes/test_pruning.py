"""The methods that PAdam is compared with: they prune exactly what they say they do, on models of every make."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import blocks, tiny_gpt2, tiny_llama
from support.calibration import _batches, _layer_by_layer, linear_weights, observed
from support.errors import UsageError
from support.gradual_pruning import MagnitudePruning
from support.importance_scores import prune_by_fisher, prune_by_magnitude, prune_by_wanda
from support.pruning import PruningArguments, evaluate_one_shot
from support.sparsegpt import prune_by_sparsegpt
from test_experiments import drive
from torch import nn
from transformers import default_data_collator
from transformers.pytorch_utils import Conv1D

from hf_padam import PAdamTrainer, PAdamTrainingArguments

MODELS = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
GRADUAL = [{"prune_by": method} for method in ("magnitude", "wanda", "fisher")]
AT_ONCE = [
    {"prune_by": m, "prune_start": 0.5, "prune_end": 0.5} for m in ("magnitude", "wanda", "fisher", "sparsegpt")
]
METHODS = pytest.mark.parametrize("options", GRADUAL + AT_ONCE, ids=lambda o: "-".join(map(str, o.values())))


def trainer_of(model, output_dir, pruning: PruningArguments, **changes) -> PAdamTrainer:
    options = {
        "output_dir": str(output_dir), "optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 12, "seed": 3,
        "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 4, "eval_strategy": "steps", "eval_steps": 4,
    }  # fmt: skip
    trainer = PAdamTrainer(
        model=model,
        args=PAdamTrainingArguments(**(options | changes)),
        train_dataset=blocks(),
        eval_dataset=blocks()[:4],
        data_collator=default_data_collator,
    )
    trainer.create_optimizer()
    for callback in pruning.callbacks(trainer):
        trainer.add_callback(callback)
    return trainer


def zeros(trainer: PAdamTrainer) -> dict[str, int]:
    params = dict(trainer.model.named_parameters())
    return {name: int((params[name] == 0).sum()) for name in trainer.decayed_names()}


@METHODS
@MODELS
def test_every_method_ends_with_the_share_asked_for(make, options, tmp_path):
    pruning = PruningArguments(prune_to=0.7, prune_interval=2, calibration_samples=8, **options)
    trainer = trainer_of(make(), tmp_path, pruning)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    params = dict(trainer.model.named_parameters())
    elements = sum(params[name].numel() for name in trainer.decayed_names())
    assert sum(zeros(trainer).values()) / elements == pytest.approx(0.7, abs=1e-4)
    assert all(loss < 10 for loss in losses)
    if options["prune_by"] == "wanda":  # every output has as many
        for module, weight in linear_weights(trainer.model, trainer.decayed_names()).values():
            rows = weight.T if isinstance(module, Conv1D) else weight
            counts = (rows == 0).sum(dim=1)
            assert int(counts.max() - counts.min()) <= 1
            assert abs(float(counts.float().mean()) - 0.7 * rows.shape[1]) <= 1 / len(rows)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())


@pytest.mark.parametrize("options", [*GRADUAL, AT_ONCE[-1]], ids=lambda o: "-".join(map(str, o.values())))
def test_a_resumed_run_prunes_what_the_whole_one_does(options, tmp_path):
    pruning = PruningArguments(prune_to=0.5, prune_interval=1, calibration_samples=8, **options)
    saved = {"save_strategy": "steps", "save_steps": 5}
    whole = trainer_of(tiny_llama(), tmp_path / "whole", pruning, **saved)
    whole.train()
    resumed = trainer_of(tiny_llama(), tmp_path / "whole", pruning, **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("options", [GRADUAL[1], AT_ONCE[-1]], ids=lambda o: "-".join(map(str, o.values())))
def test_until_they_prune_all_methods_see_the_same_data_and_random_numbers(options, tmp_path):
    """Dropout and the order of the data afterwards, too: pruning at once calibrates, and must not use them up."""

    def losses(pruning: PruningArguments) -> list[float]:
        trainer = trainer_of(tiny_gpt2(resid_pdrop=0.3), tmp_path, pruning, logging_steps=1, eval_strategy="no")
        seen: list[torch.Tensor] = []
        trainer.model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"]) if module.training else None,
            with_kwargs=True,
        )
        trainer.train()
        states.append(torch.get_rng_state())
        order.append(torch.cat(seen))
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    states, order = [], []
    pruned = losses(PruningArguments(prune_to=0.5, calibration_samples=8, **options))
    dense = losses(PruningArguments())
    assert pruned[:2] == dense[:2]
    assert torch.equal(*order) and torch.equal(*states)


def correlated(outputs: int = 24, inputs: int = 40, tokens: int = 300) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(8, inputs, generator=generator)
    x = torch.randn(tokens, 8, generator=generator) @ mixing + 0.2 * torch.randn(tokens, inputs, generator=generator)
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    return layer, x * torch.linspace(0.2, 2, inputs)


def oracle(weight: torch.Tensor, gram: torch.Tensor, share: float, block: int) -> torch.Tensor:
    """Column by column, with the inverse of what is left of the Hessian computed anew for each, in float64."""
    w, h = weight.double().clone(), gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    outputs, inputs = w.shape
    done = 0
    for first in range(0, inputs, block):
        columns = range(first, min(first + block, inputs))
        scores = {
            (row, j): float(w[row, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0])
            for j in columns
            for row in range(outputs)
        }
        count = round(share * outputs * (columns[-1] + 1)) - done
        done += count
        pruned = set(sorted(scores, key=scores.__getitem__)[:count])
        for j in columns:
            inverse = torch.linalg.inv(h[j:, j:])
            for row in range(outputs):
                if (row, j) in pruned:
                    w[row, j:] -= w[row, j] / inverse[0, 0] * inverse[0]
                    w[row, j] = 0.0
    return w


@pytest.mark.parametrize("block", [1, 4, 7, 40, 128])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_sparsegpt_is_what_a_naive_one_does(share, block):
    layer, x = correlated()
    expected = oracle(layer.weight.detach(), x.T @ x, share, block)
    prune_by_sparsegpt(layer, layer.weight, x.T @ x, share, block)
    assert torch.equal(layer.weight == 0, expected == 0)
    assert int((layer.weight == 0).sum()) == round(share * layer.weight.numel())
    assert torch.allclose(layer.weight.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_sparsegpt_changes_a_layers_outputs_less_than_wanda_and_that_less_than_magnitude(share):
    errors = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        layer, x = correlated()
        before = x @ layer.weight.detach().T
        if method == "sparsegpt":
            prune_by_sparsegpt(layer, layer.weight, x.T @ x, share)
        elif method == "wanda":
            prune_by_wanda({"": (layer, layer.weight)}, {"": x.norm(dim=0)}, share)
        else:
            prune_by_magnitude([layer.weight], share)
        errors.append(float((x @ layer.weight.detach().T - before).square().mean()))
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2]


def test_sparsegpt_prunes_a_transposed_layer_alike():
    layer, x = correlated()
    other = Conv1D(layer.out_features, layer.in_features)
    with torch.no_grad():
        other.weight.copy_(layer.weight.T)
    for module in (layer, other):
        prune_by_sparsegpt(module, module.weight, x.T @ x, 0.5)
    assert torch.equal(other.weight.T, layer.weight)


@pytest.mark.parametrize("inputs", ["nothing", "one token", "a huge feature", "not definite"])
def test_sparsegpt_raises_the_damping_where_a_hessian_cannot_be_factored(inputs):
    layer, x = correlated()
    x = {"nothing": 0 * x, "one token": x[:1], "a huge feature": x * torch.tensor([1e9] + 39 * [1.0])}.get(inputs, x)
    gram = x.T @ x
    if inputs == "not definite":  # as sums in low precision may be
        gram = gram - 0.05 * gram.diagonal().mean() * torch.eye(40)
    prune_by_sparsegpt(layer, layer.weight, gram, 0.5)
    assert layer.weight.isfinite().all() and int((layer.weight == 0).sum()) == layer.weight.numel() // 2


def test_sparsegpt_refuses_inputs_that_are_not_finite():
    layer, x = correlated()
    with pytest.raises(ValueError, match="not finite"):
        prune_by_sparsegpt(layer, layer.weight, x.T @ x * torch.inf, 0.5)


@MODELS
def test_layers_are_calibrated_on_what_the_pruned_ones_before_give_out(make, tmp_path):
    """Each layer's inputs, recorded as it is pruned, are those of the finished model run as a whole."""
    trainer = trainer_of(make(), tmp_path, PruningArguments())
    model = trainer.model.eval()
    linear = linear_weights(model, trainer.decayed_names())
    batches = _batches(trainer, 6)
    seen, order = {}, []

    def prune(weights, run):
        prune_by_magnitude([weight for _, weight in weights.values()], 0.5)
        with observed(weights) as sums:
            run()
        seen.update(sums)
        order.append(set(weights))

    with torch.no_grad():
        _layer_by_layer(model, linear, batches, prune)
        with observed(linear) as whole:
            for batch in batches:
                model(**batch)
    assert len(order) == 2 and set.union(*order) == set(linear) and not order[0] & order[1]
    for name in linear:
        assert torch.allclose(seen[name], whole[name], rtol=1e-4), name


def test_under_autocast_too_a_layer_is_given_what_the_pruned_ones_before_give_out(tmp_path):
    """Autocast keeps its casts of weights, whatever becomes of these."""
    trainer = trainer_of(tiny_llama(), tmp_path, PruningArguments())
    model = trainer.model.eval()
    linear = linear_weights(model, trainer.decayed_names())
    batches = _batches(trainer, 6)
    seen = {}

    def prune(weights, run):
        with observed(weights) as sums:
            run()
        seen.update(sums)
        prune_by_magnitude([weight for _, weight in weights.values()], 0.5)

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            _layer_by_layer(model, linear, batches, prune)
        with torch.autocast("cpu", torch.bfloat16), observed(linear) as whole:
            for batch in batches:
                model(**batch)
    (second,) = [name for name in linear if "1.self_attn.q_proj" in name]
    assert torch.allclose(seen[second], whole[second], rtol=1e-3)


def test_fisher_prunes_the_smallest_products_of_all_tensors_together():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(40))]
    optimizer = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.99))
    late = 3
    for step in range(5):
        for i, param in enumerate(params):
            param.grad = torch.randn_like(param) * (i + 1) if step >= late * i else None
        optimizer.step()
    steps = [5, 5 - late]
    scores = torch.cat([
        (p.detach().abs() * (optimizer.state[p]["exp_avg_sq"] / (1 - 0.99**n)).sqrt()).flatten()
        for p, n in zip(params, steps, strict=True)
    ])  # fmt: skip
    prune_by_fisher(params, optimizer, 0.4)
    zero = torch.cat([(p == 0).flatten() for p in params])
    assert set(zero.nonzero().flatten().tolist()) == set(scores.argsort()[:40].tolist())


def test_a_weight_without_evidence_is_pruned_last_and_not_in_silence(caplog):
    param = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.1]))
    unused = nn.Parameter(torch.tensor([0.01, 0.02]))  # never has a gradient, so Adam has no state for it
    optimizer = torch.optim.AdamW([param, unused], lr=0.0)
    param.grad = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    optimizer.step()
    with caplog.at_level(logging.WARNING):
        prune_by_fisher([param, unused], optimizer, 0.5)
    assert param.tolist() == [0.0, 0.0, 0.0, 4.0, 0.0, pytest.approx(0.1)] and (unused != 0).all()
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        prune_by_fisher([param, unused], optimizer, 0.75)
    assert param.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, pytest.approx(0.1)] and unused.tolist() == [
        0.0,
        pytest.approx(0.02),
    ]
    assert "1 weights that have had no gradient yet" in caplog.text


def test_equal_scores_do_not_prune_too_much():
    params = [nn.Parameter(torch.ones(7, 5)), nn.Parameter(-torch.ones(65))]
    for share in (0.3, 0.31, 0.8):
        prune_by_magnitude(params, share)
        assert sum(int((p == 0).sum()) for p in params) == round(100 * share)


@MODELS
def test_wanda_shares_grow_by_as_much_as_is_asked_for(make):
    model = make()
    linear = linear_weights(model, [n for n, p in model.named_parameters() if p.ndim == 2])
    norms = {
        name: torch.rand(w.shape[0] if isinstance(m, Conv1D) else w.shape[1]) + 0.1 for name, (m, w) in linear.items()
    }
    elements = sum(weight.numel() for _, weight in linear.values())
    for share in (0.1, 0.1003, 0.5, 0.5001, 0.51):
        prune_by_wanda(linear, norms, share)
        found = sum(int((weight == 0).sum()) for _, weight in linear.values())
        assert found == pytest.approx(share * elements, abs=len(linear) / 2)  # each matrix to the nearest weight


@pytest.mark.parametrize("optim", ["adamw_torch", "padam"])
@MODELS
def test_one_shot_prunes_by_every_method_and_puts_the_weights_back(make, optim, tmp_path):
    methods = ["magnitude", "wanda", "fisher", "sparsegpt"]
    pruning = PruningArguments(one_shot=[0.5, 0.8], one_shot_by=methods, calibration_samples=8)
    decay = {"lambda_p": 1e-6} if optim == "padam" else {}
    trainer = trainer_of(make(), tmp_path, pruning, optim=optim, **decay)
    trainer.train()
    before = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    rows = evaluate_one_shot(trainer, pruning, blocks()[4:8])
    assert [(row["method"], row["share"]) for row in rows] == [(m, s) for m in methods for s in (0.5, 0.8)]
    for row in rows:
        assert row["sparsity"] == pytest.approx(row["share"], abs=1e-4)
        assert row["validation_loss"] != row["test_loss"]
    assert all(torch.equal(before[name], param) for name, param in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prune_to": 0.5, "prune_by": "sparsegpt"},
            "prunes all at once: give --prune_start and --prune_end the same",
        ),
        ({"prune_by": "wanda"}, "--prune_by has no effect without --prune_to"),
        ({"prune_to": 0.5, "prune_by": "taylor"}, "--prune_by taylor is not one of magnitude, wanda"),
        ({"one_shot": [0.5], "one_shot_by": ["obs"]}, "--one_shot_by obs is not one of"),
        ({"one_shot": [0.5], "one_shot_by": []}, "--one_shot_by  is not one of"),
        ({"calibration_samples": 0}, "--calibration_samples 0 is too small"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        PruningArguments(**options)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"prune_to": 0.5, "prune_by": "fisher"}, {"optim": "sgd"}, "--prune_by fisher needs the state of AdamW"),
        ({"prune_to": 0.5, "prune_by": "wanda"}, {"optim": "adafactor"}, "--prune_by wanda needs the state of AdamW"),
        ({"one_shot": [0.5]}, {"optim": "adafactor"}, "--one_shot_by fisher needs the state of AdamW"),
        ({"prune_to": 0.5, "prune_by": "wanda"}, {"decay_embeddings": True}, "but transformer.wte.weight and 1 other"),
        ({"prune_to": 0.5, "prune_by": "fisher"}, {"optim": "padam"}, "are methods to compare padam with"),
    ],
    ids=["fisher-sgd", "wanda-adafactor", "one_shot-adafactor", "wanda-embeddings", "padam"],
)
def test_what_a_method_cannot_prune_is_refused_before_training(options, changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        trainer_of(tiny_gpt2(), tmp_path, PruningArguments(**options), **changes)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_an_optimizer_without_second_moments_does_for_what_needs_none(method, tmp_path):
    pruning = PruningArguments(prune_to=0.5, prune_by=method, prune_start=0.5, prune_end=0.5, calibration_samples=4)
    trainer = trainer_of(tiny_llama(), tmp_path, pruning, optim="sgd")
    trainer.train()
    assert sum(zeros(trainer).values()) > 0


def test_pruned_weights_stay_zero_though_adam_would_move_them():
    param = nn.Parameter(torch.arange(1.0, 11.0))
    optimizer = torch.optim.AdamW([param], lr=0.1)
    shares = drive(MagnitudePruning([param], 0.4, 0.2, 0.2, 1), [param], optimizer, 20, gradient=-1.0)
    assert shares == [0.0] * 3 + [0.4] * 17
