"""A .gguf file as the dense model: dequantised by transformers, with its tokenizer; without the packages a clear error."""

import json

import pytest
import torch
from test_cli import S, V, call, contents, prose, tokenizer, write_model  # noqa: F401  (tokenizer is a fixture)
from transformers import AutoTokenizer, LlamaForCausalLM

import dotmoe_kernels as dk
from dotmoe_kernels.conversion import find_ffns, sources
from dotmoe_kernels.conversion.sources import read_dense, read_tokenizer

LAYERS, HEADS, H = 2, 2, 32


def rope_order(weight):
    """Rows of queries or keys as llama.cpp has them: the halves that are rotated against one another alternate."""
    return weight.view(HEADS, 2, -1, H).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, words):
    """Q8_0 the FFNs, float32 the rest."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(H // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    known = words.get_vocab()
    names_of_tokens = sorted(known, key=known.get) + [f"<unused {n}>" for n in range(V - len(known))]
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names_of_tokens)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {f"model.layers.{n}.{k}": f"blk.{n}.{v}" for n in range(LAYERS) for k, v in parts.items()}
    expected = {}
    for key, tensor in model.state_dict().items():
        name = names[key.removesuffix(".weight")]
        value = (rope_order(tensor) if "attn_q" in name or "attn_k" in name else tensor).float().numpy()
        expected[key] = tensor
        if "ffn_" in name and "norm" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quants.quantize(value, kind)
            expected[key] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tokenizer):  # noqa: F811
    """(folder with model.gguf and text.txt, the weights that are in it)."""
    folder = tmp_path_factory.mktemp("gguf")
    model = write_model(folder / "dense", None)
    (folder / "text.txt").write_text(prose(60))
    return folder, write_gguf(folder / "model.gguf", model, tokenizer)


def test_the_weights_are_those_of_the_file_in_a_plain_model(packed, tmp_path):
    folder, expected = packed
    model = read_dense(str(folder / "model.gguf"))
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.float32
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    assert not hasattr(model.config, "quantization_config")
    assert len(find_ffns(model)) == LAYERS
    model.save_pretrained(tmp_path)
    assert "quant" not in (tmp_path / "config.json").read_text()
    assert read_dense(str(folder / "model.gguf"), torch.bfloat16).dtype == torch.bfloat16


def test_the_tokenizer_is_that_of_the_file(packed, tokenizer):  # noqa: F811
    text = prose(3, seed=2)
    found = read_tokenizer(str(packed[0] / "model.gguf"))
    assert found(text, add_special_tokens=False)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def arguments(folder, output, *extra, model="model.gguf"):
    return [
        *("convert", folder / model, "--data", folder / "text.txt", "--output", output, "--no-progress"),
        *("--expert-size", 8, "--sequence-length", S, "--batch-size", 2, "--steps", 2, *extra),
    ]


def test_convert_says_that_it_is_dequantised(capsys, packed, tmp_path):
    folder, expected = packed
    before = contents(folder)
    status, out, err = call(capsys, *arguments(folder, tmp_path / "moe"))
    assert (status, err) == (0, "")
    assert contents(folder) == before
    assert out.splitlines()[0] == f"{folder / 'model.gguf'}: dequantised by transformers, to float32"
    assert "every expert on = dense: relative error" in out
    dense = dk.conversion.restore_dense(dk.load(tmp_path / "moe"))
    for name, weight in expected.items():
        assert torch.equal(dense.state_dict()[name], weight), name
    text = prose(2, seed=3)
    ids = read_tokenizer(str(folder / "model.gguf"))(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")(text)["input_ids"] == ids


def test_a_dry_run_reads_the_file(capsys, packed):
    status, out, err = call(capsys, "convert", packed[0] / "model.gguf", "--dry-run", "--expert-size", 8)
    assert (status, err) == (0, "")
    assert "topology: 2 layers of F = 64 = E 8 x s 8" in out


def test_a_file_that_is_no_gguf_is_named(capsys, packed, tmp_path):
    path = packed[0] / "broken.gguf"
    path.write_bytes(b"GGUF? no, text\n" * 50)
    try:
        status, out, err = call(capsys, *arguments(packed[0], tmp_path / "moe", model="broken.gguf"))
    finally:
        path.unlink()
    assert (status, out) == (2, "")
    assert err.startswith(f"dotmoe convert: error: MODEL is {path}, which ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("extra", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_without_the_packages(capsys, tmp_path, monkeypatch, package, extra):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "text.txt").write_text(prose(5))
    monkeypatch.setattr(sources, "find_spec", lambda name: None if name == package else object())
    status, _, err = call(capsys, *arguments(tmp_path, tmp_path / "moe", *extra))
    assert status == 2
    line = f"reading {tmp_path / 'model.gguf'} needs {package}: pip install 'dotmoe_kernels[gguf]'"
    assert err == f"dotmoe convert: error: {line}\n"
    assert not (tmp_path / "moe").exists()


def test_a_file_that_is_not_there(capsys, tmp_path):
    (tmp_path / "text.txt").write_text(prose(5))
    status, _, err = call(capsys, *arguments(tmp_path, tmp_path / "moe"))
    assert status == 2
    assert f"MODEL is {tmp_path / 'model.gguf'}, which is no file; allowed: a .gguf file" in err
