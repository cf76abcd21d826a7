"""Axolotl: a plug-in that makes ``optimizer: padam`` known.

    plugins:
      - hf_padam.integrations.axolotl.PAdamPlugin
    optimizer: padam
    optim_args:
      target_sparsity: 0.5

Axolotl imports plug-ins before it validates the configuration. Names of optimizers that are not its own it hands to
Transformers, where importing this package has registered "padam"; its `BasePlugin.create_optimizer` has no caller.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from ..training.optim_args import parse_optim_args
from ..training.registration import OPTIMIZERS

_OWN_GROUPS = ("loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups")


class PAdamPlugin(BasePlugin):
    """Loaded by name from Axolotl's configuration."""

    def register(self, cfg: dict[str, Any]) -> None:
        """Check what the configuration says about PAdam, before a model is loaded.

        Args:
            cfg: The configuration as it was read.

        Raises:
            ValueError: If `optim_args` is not PAdam's, or another option makes parameter groups of its own.
        """
        if cfg.get("optimizer") not in OPTIMIZERS:
            return
        options = cfg.get("optim_args")
        if isinstance(options, dict):
            for key, value in options.items():
                if "," in str(value):
                    raise ValueError(
                        f"optim_args: {key}={value!r} holds a comma, at which Axolotl's list of options is split: "
                        "write it without one, a regular expression with | for example"
                    )
            options = ",".join(f"{key}={value}" for key, value in options.items())
        parse_optim_args(options)
        for key in _OWN_GROUPS:
            if cfg.get(key) is not None:
                raise ValueError(
                    f"{key}={cfg[key]!r} does not go with optimizer: {cfg['optimizer']}: both make the parameter "
                    "groups. Drop one of them"
                )
