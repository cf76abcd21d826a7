"""LLaMA-Factory, version 1: its launcher, with PAdam among the optimizers.

    python -m hf_padam.integrations.llama_factory sft config.yaml
    torchrun --nproc_per_node 8 -m hf_padam.integrations.llama_factory sft config.yaml

    optim_config:                # in config.yaml
      name: padam
      learning_rate: 1.0e-4      # LLaMA-Factory hands its own to no optimizer plug-in
      target_sparsity: 0.5
      total_steps: 1000          # with target_sparsity

The other keys are `adam_beta1`, `adam_beta2`, `adam_epsilon`, `weight_decay`, `seed`, and those of `optim_args`.

The version before parses Transformers' TrainingArguments. Its own command starts children that know no "padam":

    torchrun --nproc_per_node 8 -m hf_padam run -m llamafactory.launcher config.yaml    # with optim: padam
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin
from torch import nn

from ..optim import PAdam, TargetSparsity
from ..training.lost_updates import warn_of_lost_updates
from ..training.options import has_target
from ..training.registration import NAME, OPTIMIZERS, build_optimizer, optimizer_options

_ARGUMENTS: dict[str, Any] = {
    "learning_rate": None,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "seed": 42,
}
"""What Transformers' training arguments say elsewhere, and their defaults there."""


def make_padam(model: nn.Module, config: dict[str, Any]) -> PAdam:
    """Make the optimizer, and attach what steers its sparsity.

    Args:
        model: The model, sharded or not.
        config: `optim_config`.

    Raises:
        ValueError: If a key is missing, unknown, or of an impossible value.
    """
    options = {key: value for key, value in config.items() if key != "name"}
    numbers = {key: options.pop(key, default) for key, default in _ARGUMENTS.items()}
    total_steps = options.pop("total_steps", None)
    if numbers["learning_rate"] is None:
        raise ValueError("optim_config has no learning_rate, and LLaMA-Factory does not hand over its own: give it")
    try:
        numbers = {key: int(value) if key == "seed" else float(value) for key, value in numbers.items()}
        steps = None if total_steps is None else int(total_steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"optim_config: {error}. {', '.join(numbers)} and total_steps must be numbers") from error
    text = ",".join(  # lists and mappings of YAML as `optim_args` has them
        f"{key}={json.dumps(value) if isinstance(value, list | dict) else value}" for key, value in options.items()
    )
    arguments: Any = SimpleNamespace(
        optim=config.get("name", NAME), optim_args=text, optim_target_modules=None, deepspeed=None, **numbers
    )
    checked = optimizer_options(arguments)
    if has_target(checked) != (steps is not None):
        raise ValueError(
            "optim_config: target_sparsity, or target_pattern, and total_steps, the number of optimizer steps, go "
            f"together: {'total_steps' if steps is None else 'the target'} is missing"
        )
    optimizer = build_optimizer(model, **checked)
    warn_of_lost_updates(optimizer.param_groups)
    if steps is not None:
        TargetSparsity(optimizer, total_steps=steps, start=checked["target_start"], end=checked["target_end"])
    return optimizer


for name in OPTIMIZERS:
    OptimizerPlugin(name).register()(make_padam)


if __name__ == "__main__":
    from llamafactory.v1.launcher import main

    main()
