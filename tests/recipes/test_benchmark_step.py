"""The benchmark recipe on a tiny model: every row is there, complete, and written as the README says."""

import json

import benchmark_step
import pytest

from hf_padam.optim.backends import BACKENDS

KEYS = {
    "model", "dtype", "device", "p_norm", "optimizer", "milliseconds", "ratio_to_fused_adamw", "gb_per_s",
    "peak_extra_bytes", "first_step_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    directory = tmp_path_factory.mktemp("benchmark")
    tiny = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmark_step.MODELS, "gpt2", tiny)
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


def test_the_two_pass_method_holds_a_copy_of_the_parameters(rows):
    extra = {row["optimizer"]: row["peak_extra_bytes"] for row in rows}
    assert extra["two-pass"] > 100_000
