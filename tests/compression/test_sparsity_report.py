"""The report of a checkpoint's sparsity, against counts made with NumPy alone from the dense files."""

import io
import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from conftest import blocks, tiny_gpt2, tiny_llama
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from hf_padam import PAdamTrainer, PAdamTrainingArguments, WeightSparsity, compress, decayed_parameters
from hf_padam.__main__ import main
from hf_padam.training.param_groups import input_dim


def sparse(model):
    torch.manual_seed(3)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param[torch.rand(param.shape) < 0.55] = 0
                param[torch.rand(param.shape) < 0.02] = 1e-12
    return model


@pytest.fixture(params=["llama", "gpt2"])
def checkpoint(request, tmp_path):
    model = sparse(tiny_llama() if request.param == "llama" else tiny_gpt2())
    model.save_pretrained(tmp_path / request.param, max_shard_size="1GB")
    return tmp_path / request.param


def report_of(path, capsys, *options):
    main(["sparsity", str(path), "--json", "-", *options])
    return json.loads(capsys.readouterr().out)


def blocks_that_hold(matrix, n, m):
    """Along the input: Linear's weight has it last, Conv1D's first."""
    holding = [
        sum(value != 0 for value in row[start : start + m]) <= n for row in matrix for start in range(0, len(row), m)
    ]
    return sum(holding) / len(holding)


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
@pytest.mark.parametrize("pattern", ["2:4", "3:8", "9:16"])
def test_every_figure_is_that_of_the_files(checkpoint, compressed, pattern, tmp_path, capsys):
    tensors = load_file(checkpoint / "model.safetensors")
    if compressed:
        compress(checkpoint, tmp_path / "compressed")
    report = report_of(tmp_path / "compressed" if compressed else checkpoint, capsys, "--pattern", pattern)
    n, m = map(int, pattern.split(":"))
    assert {row["name"] for row in report["tensors"]} == set(tensors)
    for row in report["tensors"]:
        tensor = tensors[row["name"]]
        is_decayed = tensor.ndim == 2 and not any(part in row["name"] for part in ("embed", "wte", "wpe", "lm_head"))
        assert row["decayed"] == is_decayed
        assert row["elements"] == tensor.size and row["zeros"] == int((tensor == 0).sum())
        assert row["near_zeros"] == int(((np.abs(tensor) < 1e-8) & (tensor != 0)).sum())
        if is_decayed:
            matrix = tensor.T if checkpoint.name == "gpt2" else tensor
            assert row[f"{pattern}_blocks"] == blocks_that_hold(matrix.tolist(), n, m)
    decayed = [tensors[row["name"]] for row in report["tensors"] if row["decayed"]]
    zeros = sum(int((tensor == 0).sum()) for tensor in decayed)
    assert report["sparsity"] == pytest.approx(zeros / sum(tensor.size for tensor in decayed))
    everything = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    assert report["sparsity_total"] == pytest.approx(everything / sum(tensor.size for tensor in tensors.values()))


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "3:4", "5:8"])
def test_blocks_hold_under_the_pattern_that_made_them_and_under_no_stricter_one(pattern, tmp_path, capsys):
    """N is how many of M weights stay, as in target_pattern."""
    n, m = map(int, pattern.split(":"))
    model = tiny_llama()
    with torch.no_grad():
        for param in (param for param in model.parameters() if param.dim() > 1):
            param.view(-1, m)[:, n:] = 0
    model.save_pretrained(tmp_path)
    for asked, share in (pattern, 1.0), (f"{n - 1}:{m}", 0.0), (f"{n + 1}:{m}", 1.0):
        if 0 < int(asked.split(":")[0]) < m:
            assert report_of(tmp_path, capsys, "--pattern", asked)[f"{asked}_blocks"] == share


def test_names_without_the_model_prefix_are_recognised(tmp_path, capsys):
    """As in the checkpoints of GPT-2 on the Hub."""
    sparse(tiny_gpt2()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    report = report_of(tmp_path, capsys)
    assert sum(row["decayed"] for row in report["tensors"]) == 8 and "GPT2LMHeadModel" in report["decayed_by"]


@pytest.mark.parametrize("missing", ["config.json", "a weight", "the size of one"])
def test_where_names_cannot_be_compared_it_says_that_the_decayed_set_is_not_known(checkpoint, missing, capsys):
    if missing == "config.json":
        (checkpoint / "config.json").unlink()
    else:
        tensors = load_file(checkpoint / "model.safetensors")
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2 and "layer" in name or ".h." in name)
        tensors |= {name: tensors[name][:-1].copy()} if "size" in missing else {}
        if "size" not in missing:
            del tensors[name]
        save_file(tensors, checkpoint / "model.safetensors")
    report = report_of(checkpoint, capsys)
    assert report["decayed_by"].startswith("which weights decay is not known: ")
    assert report["sparsity"] is report["decayed_parameters"] is None
    assert {row["decayed"] for row in report["tensors"]} == {None}
    everything = load_file(checkpoint / "model.safetensors").values()
    zeros = sum(int((tensor == 0).sum()) for tensor in everything)
    assert report["sparsity_total"] == pytest.approx(zeros / sum(tensor.size for tensor in everything))
    main(["sparsity", str(checkpoint)])
    table = capsys.readouterr().out
    assert "not known" in table and "decayed weights" not in table


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    main(["sparsity", str(directory)])
    said = capsys.readouterr()
    assert "is not known" in said.out and "Do you wish" not in said.out + said.err
    assert not (tmp_path / "has run").exists()


def test_what_a_config_names_is_called_if_it_is_a_model_and_not_otherwise(tmp_path, monkeypatch, capsys):
    directory = tmp_path / "model"
    tiny_llama().save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["Trainer"]}))
    monkeypatch.chdir(tmp_path)
    main(["sparsity", str(directory)])
    assert "decays by default in LlamaForCausalLM" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("shape", [[16], [32, 1], [2, 8]])
def test_weights_of_which_several_share_a_byte_are_refused_by_their_dtype(shape, tmp_path):
    size = math.prod(shape) // 2
    header = json.dumps({"a": {"dtype": "F4", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    (tmp_path / "config.json").write_text("{}")
    for arguments in ["sparsity", str(tmp_path)], ["compress", str(tmp_path), str(tmp_path / "out")]:
        with pytest.raises(SystemExit, match="tensor a has the dtype F4"):
            main(arguments)


def llava():
    text = dict(model_type="llama", **TINY, tie_word_embeddings=False)
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                  num_attention_heads=4, image_size=8, patch_size=4, projection_dim=32)  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=95))


TINY = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, moe_intermediate_size=16,
)  # fmt: skip
OTHER_NAMES = {
    "tied llama": tiny_llama,
    "llama": lambda: tiny_llama(tie_word_embeddings=False),
    "gpt2": tiny_gpt2,
    "mixtral": lambda: causal(MixtralConfig(num_local_experts=4, **TINY)),
    "qwen3 moe": lambda: causal(Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **TINY)),
    "gpt-oss": lambda: causal(GptOssConfig(num_local_experts=4, **TINY)),
    "deepseek v3": lambda: causal(
        DeepseekV3Config(
            n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1,
            q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, **TINY,
        )
    ),
    "granite moe": lambda: causal(GraniteMoeConfig(num_local_experts=4, num_experts_per_tok=2, **TINY)),
    "mamba": lambda: causal(MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2)),
    "llava": llava,
}  # fmt: skip


def causal(config):
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", OTHER_NAMES)
def test_report_card_and_compressed_directory_say_what_the_model_in_memory_says(family, tmp_path, capsys):
    model = sparse(OTHER_NAMES[family]())
    model.save_pretrained(tmp_path / "dense")
    expected = WeightSparsity().compute(model=model)
    result = compress(tmp_path / "dense", tmp_path / "compressed")
    for directory in ("dense", "compressed"):
        report = report_of(tmp_path / directory, capsys)
        assert {key: report[key] for key in expected} == pytest.approx(expected)
        assert type(model).__name__ in report["decayed_by"]
    assert {key: result.report.totals[key] for key in expected} == pytest.approx(expected)
    card = (tmp_path / "compressed" / "README.md").read_text()
    zeros, decayed = expected["sparsity"], expected["decayed_parameters"]
    assert f"Zeros: {zeros:.2%} of the {decayed:,} decayed weights, {expected['sparsity_total']:.2%} of all" in card


def test_a_config_of_more_layers_than_there_are_tensors_fills_no_memory(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": None}))
    assert "num_hidden_layers=1000000000, and there are fewer tensors" in report_of(tmp_path, capsys)["decayed_by"]


@pytest.mark.parametrize("family", ["gpt-oss", "mixtral"])
def test_blocks_hold_in_stacks_of_experts_along_their_inputs(family, tmp_path, capsys):
    model = OTHER_NAMES[family]()
    decayed = decayed_parameters(model)
    with torch.no_grad():
        for name, param in decayed.items():
            matrices = param.transpose(-1, -2) if input_dim(model, name) == -2 else param
            matrices[..., 2::4] = matrices[..., 3::4] = 0
    model.save_pretrained(tmp_path)
    rows = [row for row in report_of(tmp_path, capsys)["tensors"] if row["decayed"]]
    assert any(len(row["shape"]) == 3 for row in rows) == (family == "gpt-oss")
    assert {row["2:4_blocks"] for row in rows} == {1.0}


def test_blocks_hold_along_the_inputs_of_stacks_that_loading_transposes(tmp_path, capsys):
    """As the original checkpoints of Qwen3-VL's mixtures have them; Transformers saves them in its own way."""
    sizes = dict(hidden_size=32, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=1)
    text = sizes | dict(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4)
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
    vision = dict(hidden_size=32, intermediate_size=64, depth=1, num_heads=4, patch_size=4, out_hidden_size=32)
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]})
    model = Qwen3VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for name, param in decayed_parameters(model).items():
            matrices = param.transpose(-1, -2) if input_dim(model, name) == -2 else param
            matrices[..., 2::4] = matrices[..., 3::4] = 0
    model.save_pretrained(tmp_path)
    shapes = {name: param.shape for name, param in model.state_dict().items()}
    weights = load_torch(tmp_path / "model.safetensors")
    stacks = {name: t for name, t in weights.items() if "experts" in name and t.ndim == 3}
    for name, tensor in stacks.items():
        if tensor.shape == shapes[name]:  # not as the originals have it
            weights[name] = tensor.transpose(1, 2).contiguous()
    save_torch(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path)
    assert stacks and all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    rows = [row for row in report_of(tmp_path, capsys)["tensors"] if row["decayed"]]
    assert {row["2:4_blocks"] for row in rows} == {1.0}


@pytest.mark.parametrize("m", [255, 256, 512])
def test_blocks_may_be_of_any_length(m, tmp_path, capsys):
    model = tiny_llama(intermediate_size=m)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    model.save_pretrained(tmp_path)
    rows = report_of(tmp_path, capsys, "--pattern", f"1:{m}")["tensors"]
    assert {row[f"1:{m}_blocks"] for row in rows if "down_proj" in row["name"]} == {1.0}


@pytest.mark.parametrize("optim", ["padam", "adamw_torch"])
@pytest.mark.parametrize(
    "choice",
    [
        {"decay_embeddings": True},
        {"dense_modules": ["down_proj"]},
        {"optim_target_modules": ["q_proj"]},
        {"target_sparsity": {"mlp": 0.5}},
        {},
    ],
    ids=str,
)
def test_the_report_is_about_the_weights_that_decayed_whichever_they_were(choice, optim, tmp_path, capsys):
    if optim != "padam" and choice and "decay_embeddings" not in choice:
        pytest.skip("these options have no effect on other optimizers, which is an error")
    common = dict(max_steps=13, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", optim=optim)
    args = PAdamTrainingArguments(str(tmp_path / "out"), learning_rate=3e-3, **common, **choice)
    trainer = PAdamTrainer(tiny_llama(tie_word_embeddings=False), args, train_dataset=blocks())
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    main(["sparsity", str(tmp_path / "model"), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["sparsity"] == pytest.approx(trainer.sparsity()["sparsity"], abs=1e-9)
    assert {row["name"] for row in report["tensors"] if row["decayed"]} == set(trainer.decayed_names())


def test_a_second_copy_of_tied_weights_is_not_counted(tmp_path, capsys):
    model = sparse(tiny_llama())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    report = report_of(tmp_path, capsys)
    assert report["total_parameters"] == sum(param.numel() for param in model.parameters())


def test_zeros_of_packed_weights_are_not_known(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: np.zeros((1024, 1), np.uint8)}, tmp_path / "model.safetensors")
    report = report_of(tmp_path, capsys)
    assert report["sparsity"] is report["sparsity_total"] is None
    assert {row["sparsity"] for row in report["tensors"] if row["dtype"] == "U8"} == {None}


def test_complex_weights_are_counted(tmp_path, capsys):
    save_torch({"w": torch.tensor([[1j, 0, 1 + 1j, 2]])}, tmp_path / "model.safetensors")
    assert report_of(tmp_path, capsys)["tensors"][0]["zeros"] == 1


def test_the_table_shows_each_layer_and_both_totals(checkpoint, capsys):
    main(["sparsity", str(checkpoint)])
    lines = capsys.readouterr().out.splitlines()
    assert "2:4 blocks" in lines[0] and sum("layers." in line or ".h." in line for line in lines) in (14, 8)
    assert lines[-3].startswith("decayed weights") and lines[-2].startswith("whole model")


def test_the_picture_is_drawn_or_the_missing_package_named(checkpoint, tmp_path, monkeypatch):
    main(["sparsity", str(checkpoint), "--picture", str(tmp_path / "zeros.png")])
    assert (tmp_path / "zeros.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"hf-padam\[recipes\]"):
        main(["sparsity", str(checkpoint), "--picture", str(tmp_path / "other.png")])
    with pytest.raises(SystemExit, match="does not say which format"):
        main(["sparsity", str(checkpoint), "--picture", str(tmp_path / "zeros")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/path"], "neither a directory nor a model's id"),
        (["nobody/no-such-model"], "could not be had from the Hub"),
        ([".", "--pattern", "4:2"], "no N:M pattern"),
        ([".", "--pattern", "two"], "no N:M pattern"),
    ],
)
def test_wrong_arguments_are_one_clear_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["sparsity", *arguments])


@pytest.mark.parametrize("command", ["sparsity", "verify"])
@pytest.mark.parametrize("full", [True, False], ids=["a full disk", "a closed pipe"])
def test_output_that_nobody_takes_is_one_clear_line(command, full, model_dir, monkeypatch):
    ours, theirs = os.pipe()
    os.close(ours)
    with open("/dev/full" if full else theirs, "w") as output:  # and nothing is left to fail as it is closed
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit):
            main([command, str(model_dir)])


def test_layers_are_in_the_order_of_their_numbers(tmp_path, capsys):
    tiny_llama(num_hidden_layers=12).save_pretrained(tmp_path)
    main(["sparsity", str(tmp_path)])
    layers = [int(line.split(".")[2]) for line in capsys.readouterr().out.splitlines() if "layers." in line]
    assert layers == sorted(layers) and layers[-1] == 11
