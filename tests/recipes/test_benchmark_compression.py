"""The compression benchmark on a tiny model: every figure is there, and is what its column says."""

import benchmark_compression
import pytest


@pytest.fixture(autouse=True)
def tiny_gpt2(monkeypatch):
    tiny = dict(model_type="gpt2", n_embd=64, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    monkeypatch.setitem(benchmark_compression.MODELS, "gpt2", tiny)


def test_the_bitmask_is_a_bit_per_linear_weight_and_two_bytes_per_weight_that_is_left(tmp_path):
    sizes = benchmark_compression.measure_sizes("gpt2", 0.5, tmp_path)
    assert set(benchmark_compression.SIZE_COLUMNS) == set(sizes)
    linear, others = 2 * 12 * 64 * 64, 96 * 64 + 2 * 13 * 64 + 2 * 64
    expected = linear / 8 + 2 * 0.5 * linear + 2 * others  # fewer by the biases, which are zeros at first
    assert sizes["bitmask"] * 1e6 == pytest.approx(expected, rel=0.03)
    assert sizes["hf_padam"] < sizes["bitmask"] < sizes["dense"]


def test_operations_are_timed_and_their_memory_watched(tmp_path):
    benchmark_compression.make("gpt2", 0.5, tmp_path / "dense")
    for operation, source, destination in (
        ("compress", "dense", "packed"), ("load", "packed", ""), ("decompress", "packed", "back")
    ):  # fmt: skip
        figures = benchmark_compression.perform(operation, str(tmp_path / source), str(tmp_path / destination))
        assert figures["seconds"] > 0 and figures.keys() == {"seconds", "cpu_seconds", "peak"}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("dense", "back")]
    assert weights[0] == weights[1]
