"""PAdam for Hugging Face Transformers: fine-tune with ``optim="padam"`` and the language model comes out sparse."""

from .optimizer import PAdam

__version__ = "0.1.0"
__all__ = ["PAdam"]
