"""The benchmark recipe on a tiny model: every row is there, complete, and written as the README says."""

import importlib.util
import json

import benchmark_step
import pytest
from support import host_time
from transformers import AutoConfig, AutoModelForCausalLM

from hf_padam.optim.backends import BACKENDS

KEYS = {
    "model", "dtype", "device", "p_norm", "optimizer", "milliseconds", "ratio_to_fused_adamw", "gb_per_s",
    "peak_extra_bytes", "first_step_seconds",
}  # fmt: skip
TINY = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    directory = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark_step.MODELS, "gpt2", TINY)
        arguments = "--models gpt2 --dtypes fp32 --p_norms 0.8 1 --repeats 2 --trainer_steps 4 --trainer_batch 2 16"
        output, picture = directory / "rows.json", directory / "bars.png"
        benchmark_step.main([*arguments.split(), "--output", str(output), "--picture", str(picture)])
    assert picture.stat().st_size > 0
    return json.loads(output.read_text())


def test_each_row_has_every_key(rows):
    assert all(KEYS <= row.keys() for row in rows)
    assert all(row["milliseconds"] > 0 and row["model"] == "gpt2" for row in rows)


def test_all_contenders_are_timed(rows):
    timed = {(row["optimizer"], row["p_norm"]) for row in rows}
    assert {("AdamW for-loop", None), ("AdamW foreach", None), ("AdamW fused", None), ("copy", None)} <= timed
    assert {("two-pass", 0.8), ("two-pass", 1.0), ("PAdam eager", 0.8), ("PAdam eager", 1.0)} <= timed
    assert {name.removeprefix("PAdam ") for name, p in timed if name.startswith("PAdam")} <= set(BACKENDS)
    assert {("Trainer padam", None), ("Trainer adamw_torch_fused", None)} <= timed


def test_the_memory_of_training_is_that_of_weights_gradients_and_states_and_a_teachers_weights_more(rows):
    peaks = {row["optimizer"]: row.get("peak_bytes") for row in rows}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
    size = 4 * sum(p.numel() for p in model.parameters())
    assert peaks["Trainer padam"] >= 4 * size
    assert peaks["Trainer padam, distilled"] >= peaks["Trainer padam"] + 0.9 * size


def test_the_two_pass_method_holds_a_copy_of_the_parameters(rows):
    extra = {row["optimizer"]: row["peak_extra_bytes"] for row in rows}
    assert extra["two-pass"] > 100_000


def test_the_hosts_side_is_timed_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(host_time, "COUNTS", {"few": 3})
    benchmark_step.main(["--host", "--repeats", "2", "--output", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(KEYS <= row.keys() for row in rows)
    timed = {(row["model"], row["optimizer"]) for row in rows}
    assert {("few", "AdamW fused"), ("1 M in 100 tensors", "AdamW fused")} <= timed
    assert (("few", "PAdam triton, no launch") in timed) == bool(importlib.util.find_spec("triton"))


def test_the_hosts_side_of_a_step_is_short():
    """Half of fused AdamW's whole step is what is aimed at; the bound leaves room for a noisy machine."""
    pytest.importorskip("triton")
    rows = host_time.time_host(repeats=41)
    ratios = {row["model"]: row["ratio_to_fused_adamw"] for row in rows if "no launch" in row["optimizer"]}
    assert ratios["272 tiny tensors"] < 0.75 and ratios["1,000 tiny tensors"] < 0.6
