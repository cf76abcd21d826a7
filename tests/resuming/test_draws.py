"""What the preparation of data draws is the same in a resumed run, wherever it is drawn from."""

from __future__ import annotations

import functools
import random
import shutil

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import blocks, character_tokenizer, tiny_llama
from datasets import Dataset
from test_trainer import options
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, WeightedRandomSampler
from transformers import DataCollatorForLanguageModeling, TrainerCallback, default_data_collator

from hf_padam import PAdamTrainer, PAdamTrainingArguments
from hf_padam.resuming.draws import Place, _Numbers

ROWS = blocks(16)  # four batches an epoch
STEPS = 9


def hide(batch, share):
    """Hide about half of the tokens; `share` draws from [0, 1)."""
    batch = default_data_collator(batch)
    hidden = torch.tensor([[share() < 0.5 for _ in row] for row in batch["input_ids"]])
    return batch | {"input_ids": batch["input_ids"].masked_fill(hidden, 0)}


class Collator:
    """Draws from a generator of its own, which is made at once or when it is needed."""

    def __init__(self, make):
        self.generator = make()

    def __call__(self, batch):
        if isinstance(self.generator, torch.Generator):
            return hide(batch, functools.partial(torch.rand, (), generator=self.generator))
        return hide(batch, self.generator.random if hasattr(self.generator, "random") else self.generator.rand)


def closure():
    generator = random.Random(3)
    return lambda batch: hide(batch, generator.random)


MODULE_GENERATOR = np.random.default_rng(3)


def of_the_module(batch):
    return hide(batch, MODULE_GENERATOR.random)


HELD = {"generators": [np.random.default_rng(4)]}


class Slotted:
    __slots__ = ("generator",)

    def __init__(self):
        self.generator = random.Random(5)


class Hidden:
    """Draws from generators that are held in every other way."""

    shared = random.Random(6)

    def __init__(self):
        self.nested = [{"nest": (functools.partial(lambda slotted: slotted.generator.random(), Slotted()),)}] * 2
        self.bound = random.Random(7).random
        self.many = [random.Random(seed) for seed in range(150)]

    def __call__(self, batch, default=random.Random(8)):  # noqa: B008
        def draw():
            held = HELD["generators"][0].random() + default.random() + self.many[120].random()
            return (held + self.nested[0]["nest"][0]() + self.bound() + self.shared.random()) % 1

        return hide(batch, draw)


class Epochs(torch.utils.data.Dataset):
    """Rows that depend on the epoch, as the loader tells it."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return {name: row[self.epoch : self.epoch + 16] for name, row in ROWS[index].items()}


class Cropped(torch.utils.data.Dataset):
    """Rows with random draws in them."""

    def __init__(self, draw=random.random, seed=None):
        self.draw, self.generator = draw, None if seed is None else np.random.default_rng(seed)

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        start = int(8 * (self.generator.random() if self.generator else self.draw()))
        return {name: row[start : start + 16] for name, row in ROWS[index].items()}


class Stream(IterableDataset):
    """Rows in an order of its own each time, shorter than the run."""

    def __init__(self, make=lambda: random):
        self.generator = make()

    def __iter__(self):
        rows = list(ROWS[:10])
        self.generator.shuffle(rows)
        yield from rows


def hf_stream():
    return Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2).shuffle(seed=1, buffer_size=8)


def mapped_stream():
    """Of functions with generators of their own."""
    shuffler, cropper = random.Random(3), np.random.default_rng(3)

    def rows():
        yield from shuffler.sample(ROWS[:10], 10)

    def crop(row):
        start = int(cropper.integers(8))
        return {name: values[start : start + 16] for name, values in row.items()}

    return datasets.IterableDataset.from_generator(rows).map(crop).shuffle(seed=1, buffer_size=4)


def language_modeling(seed=None):
    tokenizer = character_tokenizer()
    tokenizer.mask_token = "~"
    return lambda: DataCollatorForLanguageModeling(tokenizer, seed=seed)


class Weighted(PAdamTrainer):
    """Samples with replacement, from torch's own generator or another."""

    generator = None

    def _get_train_sampler(self, *args):
        return WeightedRandomSampler(torch.arange(1.0, len(ROWS) + 1), len(ROWS), generator=self.generator)


def masking(collator, **more):
    return lambda: dict(data_collator=collator(), train_dataset=ROWS, **more)


def rows_from(dataset, **more):
    return lambda: dict(data_collator=default_data_collator, train_dataset=dataset(), **more)


WORKERS = {"dataloader_num_workers": 2}
PERSISTENT = WORKERS | {"dataloader_persistent_workers": True}
KINDS = {
    "masked": masking(language_modeling()),
    "masked, seeded": masking(language_modeling(5)),
    "masked, workers": masking(language_modeling(), **WORKERS),
    "masked, seeded, workers": masking(language_modeling(5), **WORKERS),
    "masked, seeded, persistent workers": masking(language_modeling(5), **PERSISTENT),
    "python": masking(lambda: lambda batch: hide(batch, random.random)),
    "numpy": masking(lambda: lambda batch: hide(batch, np.random.random)),
    "own of torch": masking(lambda: Collator(lambda: torch.Generator().manual_seed(3))),
    "own of numpy": masking(lambda: Collator(lambda: np.random.default_rng(3))),
    "own of old numpy": masking(lambda: Collator(lambda: np.random.RandomState(3))),
    "own of python": masking(lambda: Collator(lambda: random.Random(3)), gradient_accumulation_steps=2),
    "in a closure": masking(closure),
    "of the module": masking(lambda: of_the_module),
    "hidden": masking(Hidden),
    "epochs, persistent workers": rows_from(Epochs, **PERSISTENT),
    "dataset": rows_from(Cropped),
    "dataset, numpy": rows_from(lambda: Cropped(np.random.random), **WORKERS),
    "dataset, own": rows_from(lambda: Cropped(seed=3), **PERSISTENT),
    "grouped by length": rows_from(lambda: ROWS, train_sampling_strategy="group_by_length"),
    "weighted": rows_from(lambda: ROWS, kind=Weighted),
    "weighted, own": lambda: rows_from(
        lambda: ROWS, kind=type("", (Weighted,), {"generator": torch.Generator().manual_seed(3)})
    )(),
    "stream": rows_from(Stream),
    "stream, accumulated": rows_from(Stream, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    "stream, ends within an accumulation": rows_from(Stream, gradient_accumulation_steps=3),
    "stream, own": rows_from(lambda: Stream(lambda: random.Random(3))),
    "stream, own, persistent workers": rows_from(lambda: Stream(lambda: random.Random(3)), **PERSISTENT),
    "stream of datasets": rows_from(hf_stream),
    "stream of datasets, workers": rows_from(hf_stream, **WORKERS),
    "stream, masked, workers": lambda: rows_from(hf_stream, **WORKERS)() | {"data_collator": language_modeling(5)()},
}


def trainer(directory, kind, train_dataset, data_collator, **more):
    settings = dict(optim_args=None, p_norm=0.5, lambda_p=0.3, max_steps=STEPS, save_strategy="steps", save_steps=2)
    args = PAdamTrainingArguments(**options(directory, logging_steps=1) | settings | more)
    model = tiny_llama(num_hidden_layers=1, attention_dropout=0.1)
    return kind(
        model=model, args=args, train_dataset=train_dataset, data_collator=data_collator, eval_dataset=blocks(4)
    )


def run(directory, spec, resume=False, **more):
    started = trainer(directory, **{"kind": PAdamTrainer, **spec, **more})
    started.train(resume_from_checkpoint=resume)
    rows = [{k: v for k, v in row.items() if not k.endswith(("runtime", "per_second", "flos"))}
            for row in started.state.log_history]  # fmt: skip
    return torch.cat([p.detach().flatten() for p in started.model.parameters()]), rows


def resumed(directory, spec, step, **more):
    """Go on from a checkpoint of the run in `directory / "whole"`."""
    shutil.copytree(directory / "whole" / f"checkpoint-{step}", directory / str(step) / f"checkpoint-{step}")
    return run(directory / str(step), spec, resume=True, **{"save_strategy": "no", **more})


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_draws_what_the_interrupted_one_would_have(name, tmp_path, caplog):
    weights, log = run(tmp_path / "whole", KINDS[name]())
    for step in (2, 6):  # in the first epoch, and in a later one
        again, its_log = resumed(tmp_path, KINDS[name](), step)
        assert torch.equal(again, weights)
        assert its_log == log
    assert not [r for r in caplog.records if "exactly" in r.getMessage() or "random" in r.getMessage()]


@pytest.mark.parametrize("name", ["masked, seeded", "own of numpy"])
def test_other_seeds_draw_otherwise(name, tmp_path):
    other = {
        "masked, seeded": masking(language_modeling(6)),
        "own of numpy": masking(lambda: Collator(lambda: np.random.default_rng(4))),
    }[name]
    first, second, third = (
        run(tmp_path / directory, spec(), save_strategy="no", max_steps=3, **more)[0]
        for directory, spec, more in (("a", KINDS[name], {}), ("b", other, {}), ("c", KINDS[name], {"data_seed": 1}))
    )
    assert not torch.equal(first, second) and not torch.equal(first, third)


@pytest.mark.parametrize("step", [4, 8, 9])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_what_the_end_of_an_epoch_logs_is_not_lost_by_a_checkpoint_of_its_last_step(step, strategy, tmp_path):
    """Four steps make an epoch; the run ends in the middle of one."""
    more = dict(eval_strategy=strategy, logging_strategy=strategy, eval_steps=3)
    spec = KINDS["python"]()
    weights, log = run(tmp_path / "whole", spec, save_steps=1, **more)
    again, its_log = resumed(tmp_path, spec, step, **more)
    assert torch.equal(again, weights) and its_log == log


class Samples(TrainerCallback):
    """Draws on an event, as generating text with the model does."""

    def draw(self, *args, **kwargs):
        random.random(), np.random.random(), torch.rand(1)

    on_evaluate = on_save = on_epoch_end = draw


class Sampling(PAdamTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, callbacks=[Samples()])


@pytest.mark.parametrize("step", [2, 4, 6])
def test_what_callbacks_draw_once_a_checkpoint_is_saved_changes_nothing_that_follows(step, tmp_path):
    spec = KINDS["python"]() | {"kind": Sampling, "eval_strategy": "steps", "eval_steps": 2}
    weights, log = run(tmp_path / "whole", spec)
    again, its_log = resumed(tmp_path, spec, step)
    assert torch.equal(again, weights) and its_log == log


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_runs_that_save_at_the_end_of_epochs_go_on_the_same(strategy, tmp_path):
    more = dict(eval_strategy=strategy, logging_strategy=strategy, save_strategy="epoch")
    for name in ("python", "stream", "stream, ends within an accumulation"):
        weights, log = run(tmp_path / name / "whole", KINDS[name](), **more)
        steps = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / name / "whole").glob("checkpoint-*"))
        again, its_log = resumed(tmp_path / name, KINDS[name](), steps[len(steps) // 2 - 1], **more)
        assert torch.equal(again, weights) and its_log == log


@pytest.mark.parametrize("more", [{}, PERSISTENT], ids=["", "persistent workers"])
def test_what_evaluations_draw_changes_nothing_that_follows(more, tmp_path):
    """Workers that persist are started at the first one of a process. One at the start is not repeated."""
    spec = KINDS["masked"]() | {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True} | more
    weights, log = run(tmp_path / "whole", spec)
    again, its_log = resumed(tmp_path, spec, 4)
    assert torch.equal(again, weights)
    assert [row["step"] for row in its_log] == [row["step"] for row in log] and log[0]["step"] == 0
    assert more or its_log == log  # what collators draw in workers that persist depends on what these have drawn


def test_each_evaluation_reads_the_data_that_it_is_given(tmp_path):
    started = trainer(tmp_path, PAdamTrainer, ROWS, default_data_collator, **PERSISTENT)
    others = blocks(3)
    loaders = [started.get_eval_dataloader(data) for data in (others, None, None, others)]
    assert [len(loader.dataset) for loader in loaders] == [3, 4, 4, 3]
    assert loaders[1] is loaders[2], "whose workers persist"


def test_a_sampler_that_wants_to_know_the_epoch_hears_of_it_however_deep_it_is():
    class Told(SequentialSampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

    sampler, place = Told(range(6)), Place(0, 0)
    place.epoch = 3
    shard = BatchSamplerShard(BatchSampler(sampler, 2, False), 2, 0)
    assert list(_Numbers(shard, place)) and sampler.epoch == 3


@pytest.mark.parametrize(
    "name", ["plain", "masked", "masked, seeded", "dataset", "weighted", "stream", "own of numpy"]
)
def test_a_checkpoint_of_other_code_says_that_draws_are_not_repeated(name, tmp_path, caplog):
    spec = {"data_collator": default_data_collator, "train_dataset": ROWS} if name == "plain" else KINDS[name]()
    weights, _ = run(tmp_path / "whole", spec)
    for ours in ("run_state.json", "hf_padam_complete.json"):
        (tmp_path / "whole" / "checkpoint-6" / ours).unlink()
    caplog.clear()
    again, _ = resumed(tmp_path, spec, 6)
    warned = "does not say which are next: what follows is not exactly" in caplog.text
    assert torch.equal(again, weights) != warned == (name != "plain")


class OwnLoader(PAdamTrainer):
    def get_train_dataloader(self):
        return DataLoader(ROWS, batch_size=4, collate_fn=default_data_collator)


def test_a_loader_of_ones_own_making_is_pointed_out(tmp_path, caplog):
    spec = {"data_collator": default_data_collator, "train_dataset": ROWS, "kind": OwnLoader}
    weights, _ = run(tmp_path / "whole", spec)
    assert "exactly" not in caplog.text
    again, _ = resumed(tmp_path, spec, 2)
    assert torch.equal(again, weights) and "goes on exactly only if" in caplog.text


def test_generators_of_functions_that_a_stream_of_datasets_maps_are_pointed_out(tmp_path, caplog):
    run(tmp_path / "plain", KINDS["stream of datasets"]())
    assert "maps, or is made from, draw" not in caplog.text
    run(tmp_path / "mapped", rows_from(mapped_stream)())
    assert "maps, or is made from, draw" in caplog.text


def test_the_default_device_is_not_where_the_place_in_the_data_is_kept():
    torch.set_default_device("meta")
    try:
        place = Place(0, 0)
        place.epoch = 3
        assert place.epoch == 3
    finally:
        torch.set_default_device(None)
