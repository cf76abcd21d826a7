"""The optimizer: PAdam, its update and the backends that run it, schedules, and the steering to a target sparsity.

Imports torch and the ground floor (`sparsity`, `files`) alone: nothing here knows of Transformers or accelerate.
Other rooms import the names below from here; constants and checks from the files that they belong to.
"""

from .any_optimizer import add_pnorm_decay
from .eight_bit import PAdam8bit
from .padam import PAdam, unwrap
from .schedules import PNormScheduler, p_norm_at
from .target_sparsity import TargetSparsity, steering_of

__all__ = [
    "PAdam",
    "PAdam8bit",
    "PNormScheduler",
    "TargetSparsity",
    "add_pnorm_decay",
    "p_norm_at",
    "steering_of",
    "unwrap",
]
