"""Conversations to fine-tune on: those of a dataset, or each passage of a text as the answer to the one before it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset

from .arguments import SplitArguments
from .data import BYTE_ORDER_MARK, SPLITS, load_raw, text_column, with_all_splits
from .errors import UsageError


@dataclass
class ConversationArguments(SplitArguments):
    """Which conversations to train and evaluate on."""

    streaming: ClassVar[bool] = False


def load_conversations(
    args: ConversationArguments, main_process_first: AbstractContextManager, hub_options: dict[str, Any]
) -> dict[str, Dataset]:
    """Return the splits train, validation and test as datasets that TRL takes.

    Rows of `messages`, or of `prompt` and `completion`, are handed on as they are. A text is cut into passages, which
    blank lines separate (lines, if there are none); each is the completion to the prompt that the one before it is.

    Args:
        args: What to load.
        main_process_first: A context manager under which one process fills the cache before the others read it.
        hub_options: `token` and `cache_dir` for datasets on the Hub.

    Raises:
        UsageError: If the data cannot be read, or hold neither conversations nor text.
    """
    with main_process_first:
        raw: dict[str, Dataset] = dict(load_raw(args, hub_options))
        columns = set(next(iter(raw.values())).column_names)
        if "messages" not in columns and not {"prompt", "completion"} <= columns:
            column = text_column(raw, args.text_column)
            raw = {split: _answers(rows[column], split) for split, rows in raw.items()}
        splits = with_all_splits(raw, args)
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            if (what := _defect(row)) is not None:
                raise UsageError(f"the conversation in row {number + 1} of {split} cannot be used: {what}")
    limits = {split: args.max_train_samples if split == "train" else args.max_eval_samples for split in SPLITS}
    return {split: rows.select(range(min(limits[split] or len(rows), len(rows)))) for split, rows in splits.items()}


def _defect(row: Mapping[str, Any]) -> str | None:
    """Say what TRL could not use of a row, and would not say so; None if nothing."""
    if "messages" in row:
        return _no_messages("messages", row["messages"])
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return None
    return _no_messages("prompt", prompt) or _no_messages("completion", completion)


def _no_messages(name: str, messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        text = " (or both prompt and completion text)" * (name != "messages")
        return f"{name} is {messages!r}, which must be a list of messages{text}"
    for message in messages:
        known = message if isinstance(message, dict) else {}
        content = known.get("content")
        if not isinstance(known.get("role"), str) or not (
            isinstance(content, str | list) or known.get("tool_calls")  # which may stand for it
        ):
            return f"a message is {message!r}, which must have a role and a content, both text"
    return None


def _answers(texts: Iterable[str], split: str) -> Dataset:
    """Make conversations of two turns from each passage of a text and the next one."""
    whole = "".join(text.removeprefix(BYTE_ORDER_MARK).rstrip("\n") + "\n" for text in texts if text)
    passages = [passage.strip() for passage in re.split(r"\n\s*\n", whole) if passage.strip()]
    if len(passages) < 2:
        passages = [line.strip() for line in whole.splitlines() if line.strip()]
    if len(passages) < 2:
        raise UsageError(f"the {split} text has {len(passages)} passages: a prompt and an answer take two")
    prompts = [[{"role": "user", "content": passage}] for passage in passages[:-1]]
    completions = [[{"role": "assistant", "content": passage}] for passage in passages[1:]]
    return Dataset.from_dict({"prompt": prompts, "completion": completions})
