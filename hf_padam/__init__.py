"""PAdam for Hugging Face Transformers: fine-tune with ``optim="padam"`` and the language model comes out sparse.

Importing this package registers the name "padam" with Transformers. PAdam is Adam with pWD, the decoupled weight decay
for any p norm of arXiv 2404.10824; it is not the *partially adaptive* "Padam" of arXiv 1806.06763.
"""

from . import compressed_loading as compressed_loading  # registers the loader of compressed models
from . import registration
from .compression import compress, decompress, save_compressed
from .eight_bit import PAdam8bit
from .metrics import Perplexity, WeightSparsity, sequence_nll
from .optimizer import PAdam
from .param_groups import decayed_parameters, get_param_groups
from .pnorm_decay import add_pnorm_decay
from .schedules import PNormScheduleCallback, PNormScheduler, p_norm_at
from .target_callbacks import TargetSparsityCallback
from .target_sparsity import TargetSparsity
from .trainer import PAdamTrainer, PAdamTrainingArguments

__version__ = "0.1.0"
__all__ = [
    "PAdam",
    "PAdam8bit",
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
    "get_param_groups",
    "p_norm_at",
    "save_compressed",
    "sequence_nll",
]

registration.register()
