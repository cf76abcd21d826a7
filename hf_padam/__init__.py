"""PAdam for Hugging Face Transformers: fine-tune with ``optim="padam"`` and the language model comes out sparse.

Importing this package registers the names "padam" and "padam_8bit" with Transformers, and the loader of compressed
models. PAdam is Adam with pWD, the decoupled weight decay
for any p norm of arXiv 2404.10824; it is not the *partially adaptive* "Padam" of arXiv 1806.06763.
"""

import sys

from .compression import loading as loading  # registers the loader of compressed models
from .compression.compress import compress, decompress, save_compressed
from .optim import PAdam, PAdam8bit, PNormScheduler, TargetSparsity, add_pnorm_decay, p_norm_at
from .training import arguments, registration
from .training.arguments import PAdamTrainingArguments
from .training.callbacks import PNormScheduleCallback, TargetSparsityCallback
from .training.decay_report import describe_decay
from .training.metrics import Perplexity, WeightSparsity, sequence_nll
from .training.options import PAdamOptions
from .training.param_groups import decayed_parameters, get_param_groups
from .training.trainer import PAdamTrainer

__version__ = "0.2.0"
__all__ = [
    "PAdam",
    "PAdam8bit",
    "PAdamOptions",
    "PAdamTrainer",
    "PAdamTrainingArguments",
    "PNormScheduleCallback",
    "PNormScheduler",
    "Perplexity",
    "TargetSparsity",
    "TargetSparsityCallback",
    "WeightSparsity",
    "add_pnorm_decay",
    "compress",
    "decayed_parameters",
    "decompress",
    "describe_decay",
    "get_param_groups",
    "p_norm_at",
    "save_compressed",
    "sequence_nll",
]

registration.register()
# Where `training_args.bin` of runs before 0.2 looks for `PAdamTrainingArguments`.
sys.modules[f"{__name__}.trainer"] = arguments
