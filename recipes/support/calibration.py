"""Prune a trained model's layers by what flows through them: Wanda and SparseGPT, calibrated on training data.

As in their papers, one decoder layer after another, each on what the pruned ones before it give out.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers.pytorch_utils import Conv1D

from hf_padam import PAdamTrainer

from .importance_scores import Linear, by_output, prune_by_wanda
from .sparsegpt import prune_by_sparsegpt


def linear_weights(model: nn.Module, decayed: list[str]) -> dict[str, Linear]:
    """Return the linear modules whose weights decay, and these, by the weights' names; tied embeddings are none."""
    names = {id(param): name for name, param in model.named_parameters() if name in set(decayed)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        names[id(module.weight)]: (module, module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in names.keys() - embeddings
    }


@torch.no_grad()
def prune_calibrated(trainer: PAdamTrainer, method: str, share: float, samples: int) -> None:
    """Zero this share of the weights of a model's linear layers, in one go.

    Args:
        trainer: Of the model; its training data calibrate.
        method: "wanda" or "sparsegpt".
        share: Of zeros, 0 to 1.
        samples: Training sequences to calibrate on.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    linear = linear_weights(model, trainer.decayed_names())

    def prune(weights: Mapping[str, Linear], run: Callable[[], Any]) -> None:
        with observed(weights, gram=method == "sparsegpt") as sums:
            run()
        # Each process has seen sequences of its own; all must prune the same weights.
        sums = trainer.accelerator.reduce(sums, "sum")
        if method == "sparsegpt":
            for name, (module, weight) in weights.items():
                prune_by_sparsegpt(module, weight, sums[name], share)
        else:
            prune_by_wanda(weights, {name: squares.sqrt() for name, squares in sums.items()}, share)

    training = model.training
    model.eval()
    try:
        with trainer.accelerator.autocast():
            _layer_by_layer(model, linear, _batches(trainer, samples), prune)
    finally:
        model.train(training)


def _layer_by_layer(
    model: Any,
    linear: Mapping[str, Linear],
    batches: list[dict[str, Tensor]],
    prune: Callable[[Mapping[str, Linear], Callable[[], Any]], None],
) -> None:
    """Call `prune` with the linear weights of each decoder layer, and what runs it; at last, with those of none."""
    layers = _decoder_layers(model, linear)
    hidden: list[Any] = []  # of each batch, what flows into the next layer
    others: list[list[Any]] = [[] for _ in layers]  # of each layer and batch, its other arguments: masks, positions

    def record(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if i == 0:
                hidden.append(args[0] if args else kwargs["hidden_states"])
            others[i].append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

        return hook

    def run_all() -> None:
        for batch in batches:
            model(**batch, use_cache=False)

    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(record(i), with_kwargs=True).remove)
        run_all()
    rest = dict(linear)
    for layer, arguments in zip(layers, others, strict=True):
        inside = set(layer.modules())
        weights = {name: rest.pop(name) for name, (module, _) in linear.items() if module in inside}
        run = functools.partial(_outputs, layer, hidden, arguments)
        prune(weights, run)
        torch.clear_autocast_cache()  # of casts of the weights as they were
        hidden = run()
    if rest:
        prune(rest, run_all)


def _outputs(layer: nn.Module, hidden: list[Any], arguments: list[Any]) -> list[Any]:
    outputs = [layer(x, *args, **kwargs) for x, (args, kwargs) in zip(hidden, arguments, strict=True)]
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def _decoder_layers(model: nn.Module, linear: Mapping[str, Linear]) -> list[nn.Module]:
    """Return the members of the list of modules that holds most of the linear ones."""
    modules = {module for module, _ in linear.values()}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda found: len(modules & set(found.modules())), default=[]))


def _batches(trainer: PAdamTrainer, samples: int) -> list[dict[str, Tensor]]:
    """Return this process's share of some training sequences, in batches: the same for every method with one seed.

    They are not taken from the Trainer's data loader, whose order and random numbers the training goes on with.
    """
    data: Any = trainer.train_dataset
    if isinstance(data, IterableDataset):
        rows = list(itertools.islice(data, samples))
    else:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(trainer.args.seed))
        rows = [data[i] for i in order[:samples].tolist()]
    rows = rows[trainer.args.process_index :: trainer.args.world_size]
    size = trainer.args.per_device_eval_batch_size
    batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    kept = ("input_ids", "attention_mask")
    return [trainer._prepare_inputs({key: batch[key] for key in kept if key in batch}) for batch in batches]


@contextlib.contextmanager
def observed(weights: Mapping[str, Linear], gram: bool = False) -> Iterator[dict[str, Tensor]]:
    """Sum the squares of each feature, or X X^T, over the inputs of linear modules that run in the context.

    Args:
        weights: The modules and their weights, by name.
        gram: Whether all products of two features are summed.

    Yields:
        The sums by name, fp32, (features,) or (features, features); zeros for a module that has not run yet.
    """
    sums: dict[str, Tensor] = {}

    def hook(total: Tensor) -> Callable[..., None]:
        def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().float().flatten(end_dim=-2)
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                total.add_(x.T @ x if gram else x.square().sum(dim=0))

        return observe

    with contextlib.ExitStack() as stack:
        for name, (module, weight) in weights.items():
            features = by_output(module, weight).shape[1]
            shape = (features, features) if gram else (features,)
            sums[name] = torch.zeros(shape, device=weight.device)
            stack.callback(module.register_forward_hook(hook(sums[name])).remove)
        yield sums
