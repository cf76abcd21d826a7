"""PAdam by its name in other trainers.

TRL is the real package. Axolotl 0.19, ms-swift 4.6 and LLaMA-Factory 0.9.5 pin versions of Transformers, TRL and PEFT
that exclude each other and those of these tests: where one is installed it is used, else a stand-in with the shape of
its plug-in contract.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import transformers.trainer
from conftest import REPOSITORY, blocks, character_tokenizer, tiny_llama
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import DefaultFlowCallback

from hf_padam import PAdam
from hf_padam.optim.target_sparsity import steering_of

COMMON = dict(
    max_steps=12, per_device_train_batch_size=4, learning_rate=3e-3, report_to="none", use_cpu=True, disable_tqdm=True,
    save_strategy="no",
)  # fmt: skip


def stand_in(monkeypatch, module: str, **members) -> None:
    """Make a module importable, and the packages above it, unless the real ones are."""
    if importlib.util.find_spec(module.partition(".")[0]) is not None:
        return
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        fake = ModuleType(name)
        fake.__path__ = []
        monkeypatch.setitem(sys.modules, name, fake)
    vars(sys.modules[module]).update(members)


@pytest.fixture
def load(monkeypatch):
    """Import a file of the room afresh, after the stand-ins are made."""

    def run(name: str) -> ModuleType:
        module = f"hf_padam.integrations.{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(module)

    yield run
    for name in [name for name in sys.modules if name.startswith("hf_padam.integrations.")]:
        del sys.modules[name]


def check_sparse(trainer: Trainer, target: float = 0.5) -> None:
    optimizer = steering_of(trainer.optimizer).optimizer
    assert isinstance(optimizer, PAdam)
    assert steering_of(trainer.optimizer).state()["sparsity"] == pytest.approx(target, abs=0.02)


def test_the_package_imports_none_of_them():
    code = "import sys, hf_padam; sys.exit(any('integrations' in name and 'padam' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


class BasePlugin:
    """Of axolotl.integrations.base: every method may be left out."""

    def register(self, cfg):
        """Called with the configuration as read, before it is validated."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture
def axolotl_plugin(monkeypatch, load):
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    return load("axolotl").PAdamPlugin()  # as Axolotl does with the last part of the plug-in's name


def test_axolotl_trains_by_its_configuration(tmp_path, axolotl_plugin):
    cfg = {"optimizer": "padam", "optim_args": {"target_sparsity": 0.5, "decay_embeddings": True, "p_norm": 0.5}}
    axolotl_plugin.register(cfg)
    # What its TrainerBuilder makes of names that are not in its own list.
    joined = ",".join(f"{key}={value}" for key, value in cfg["optim_args"].items())
    args = TrainingArguments(str(tmp_path), optim=cfg["optimizer"], optim_args=joined, **COMMON)
    trainer = Trainer(tiny_llama(), args, train_dataset=blocks(), data_collator=default_data_collator)
    trainer.train()
    check_sparse(trainer)


@pytest.mark.parametrize(
    ("cfg", "error"),
    [
        ({"optim_args": {"sparsity": 0.5}}, "no key 'sparsity'"),
        ({"optim_args": {"target_sparsity": "half"}}, "'half' must be a number"),
        ({"optim_args": {"dense_modules": r"layers\.\d{1,2}"}}, "holds a comma"),
        ({"optim_args": "target_sparsity"}, "is malformed"),
        ({"loraplus_lr_ratio": 8}, "loraplus_lr_ratio=8 does not go with optimizer: padam"),
        ({"embedding_lr": 1e-5}, "embedding_lr"),
    ],
)
def test_axolotl_is_told_before_a_model_is_loaded(axolotl_plugin, cfg, error):
    with pytest.raises(ValueError, match=error):
        axolotl_plugin.register({"optimizer": "padam"} | cfg)
    axolotl_plugin.register({"optimizer": "adamw_torch"} | cfg)


class OptimizerCallback:
    """Of swift.optimizers."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model=None):
        return Trainer.create_optimizer(self.trainer, **({} if model is None else {"model": model}))


@pytest.mark.parametrize("by", ["path", "name"])
@pytest.mark.parametrize("optimizer", ["padam", "padam_8bit"])
def test_ms_swift_trains_with_the_external_plugin(tmp_path, monkeypatch, load, by, optimizer):
    stand_in(
        monkeypatch,
        "swift.optimizers",
        OptimizerCallback=OptimizerCallback,
        optimizers_map={"default": OptimizerCallback},
    )
    if by == "name":
        load("ms_swift")
        # ms-swift does so at the import of its trainers, which may be later than that of the plug-in.
        monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [DefaultFlowCallback])
    else:  # as --external_plugins does
        file = REPOSITORY / "hf_padam" / "integrations" / "ms_swift.py"
        spec = importlib.util.spec_from_file_location("_swift_external_0123", file)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    if optimizer == "padam_8bit":
        pytest.importorskip("torchao")

    class SwiftTrainer(Trainer):
        """What ms-swift's mixin does with the table."""

        def __init__(self, model, args, **kwargs):
            self.optimizer_callback = sys.modules["swift.optimizers"].optimizers_map[optimizer](args, self)
            super().__init__(model, args, **kwargs)

        def create_optimizer(self, model=None):
            self.optimizer = self.optimizer_callback.create_optimizer(model=model)
            return self.optimizer

    args = TrainingArguments(str(tmp_path), optim_args="target_sparsity=0.5", **COMMON)
    args.max_epochs = None  # ms-swift's own arguments have it, and its changes to the Trainer read it
    trainer = SwiftTrainer(tiny_llama(), args, train_dataset=blocks(), data_collator=default_data_collator)
    trainer.train()
    check_sparse(trainer)
    with pytest.raises(ValueError, match="no key 'target'"):
        SwiftTrainer(tiny_llama(), TrainingArguments(str(tmp_path), optim_args="target=0.5", **COMMON))


class OptimizerPlugin:
    """Of llamafactory.v1.plugins.trainer_plugins.optimizer."""

    registry: dict = {}

    def __init__(self, name):
        self.name = name

    def register(self, method_name="__call__"):
        return lambda function: self.registry.setdefault(self.name, {}).__setitem__(method_name, function)

    def __call__(self, *args, **kwargs):
        return self.registry[self.name]["__call__"](*args, **kwargs)


@pytest.fixture
def llama_factory(monkeypatch, load):
    """`OptimizerPlugin(optim_config.name)(model, optim_config)`, as LLaMA-Factory's BaseTrainer calls it."""
    module = "llamafactory.v1.plugins.trainer_plugins.optimizer"
    stand_in(monkeypatch, module, OptimizerPlugin=OptimizerPlugin)
    load("llama_factory")
    return lambda model, config: sys.modules[module].OptimizerPlugin(config["name"])(model, config)


def test_llama_factory_trains_by_its_configuration(llama_factory):
    model = tiny_llama()
    config = {
        "name": "padam",
        "learning_rate": "3e-3",
        "target_sparsity": 0.5,
        "total_steps": 12,
        "p_norm": 0.5,
        "importance": "magnitude",
    }
    config |= {"decay_embeddings": True, "adam_beta2": 0.95}
    optimizer = llama_factory(model, config)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95) and optimizer.param_groups[0]["lr"] == 3e-3
    batch = default_data_collator(blocks(4))
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert steering_of(optimizer).state()["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert llama_factory(model, {"name": "padam", "learning_rate": 1e-4}).param_groups[0]["lambda_p"] > 0


@pytest.mark.parametrize(
    ("target", "share"),
    [
        ({"target_pattern": "2:4"}, 0.5),
        ({"target_sparsity": {"mlp": 0.75, "*": 0.25}, "dense_modules": ["o_proj"]}, 0.625),
    ],
    ids=str,
)
def test_llama_factory_takes_patterns_and_the_lists_and_mappings_of_yaml(llama_factory, target, share):
    model = tiny_llama()
    optimizer = llama_factory(model, {"name": "padam", "learning_rate": 3e-3, "total_steps": 15} | target)
    batch = default_data_collator(blocks(4))
    for _ in range(15):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert steering_of(optimizer).state()["sparsity"] == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"learning_rate": None}, "no learning_rate"),
        ({"learning_rate": "fast"}, "must be numbers"),
        ({"target_sparsity": 0.5}, "total_steps is missing"),
        ({"target_pattern": "2:4"}, "total_steps is missing"),
        ({"total_steps": 5}, "the target is missing"),
        ({"target_sparsity": 2.0, "total_steps": 5}, "target_sparsity"),
        ({"sparsity": 0.5}, "no key 'sparsity'"),
    ],
)
def test_llama_factory_is_told_what_is_wrong(llama_factory, config, error):
    with pytest.raises(ValueError, match=error):
        llama_factory(tiny_llama(), {"name": "padam", "learning_rate": 1e-4} | config)


TEXTS = [f"Line {i}: a fox, {i} dogs." for i in range(40)]


def reward(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_trl_trains_with_the_name(tmp_path, model_dir, kind):
    import trl

    tokenizer = character_tokenizer()
    tokenizer.padding_side = "left"
    columns, options, more = {
        "SFT": ({"text": TEXTS}, {"max_length": 32}, {}),
        "DPO": ({"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS[::-1]}, {"max_length": 64}, {}),
        "GRPO": ({"prompt": TEXTS}, {"max_completion_length": 4, "num_generations": 4}, {"reward_funcs": reward}),
    }[kind]
    args = getattr(trl, f"{kind}Config")(
        str(tmp_path), optim="padam", optim_args="target_sparsity=0.5", bf16=False, gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32"}, **COMMON | options | {"max_steps": 6 if kind == "GRPO" else 12},
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        str(model_dir), args=args, train_dataset=Dataset.from_dict(columns), processing_class=tokenizer, **more
    )
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.train()
    check_sparse(trainer)
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.model.parameters(), strict=True))
