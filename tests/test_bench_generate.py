"""Whole models in the benches: everybody answers the same question, decode begins where the prompt ended, bounds by hand."""

import pytest
import torch

from bench import generation, report, shapes
from bench.bench_generate import _groups
from bench.generation import NEW, Decode, Models, prompts, two_passes


@pytest.fixture(scope="module")
def tiny():
    return Models(shapes.TINY_MODEL, "float32")


def test_everybody_answers_the_same_question(tiny):
    errors = tiny.errors()
    assert set(errors) == set(generation.IMPLS) - {"llama.cpp"}
    for name, error in errors.items():
        assert error < (0.02 if name.startswith("transformers-") else 1e-5), name
    ids = prompts(tiny.size, 2, 6)
    ours, dense = (two_passes(tiny.by_name[name], ids) for name in ("ours", "dense"))
    assert float((ours - dense).norm() / dense.norm()) > 0.1
    kinds = [tiny.by_name[f"transformers-{name}"].config._experts_implementation for name in generation.EXPERTS]
    assert kinds == list(generation.EXPERTS)


def test_a_wrong_expert_is_found():
    models = Models(shapes.TINY_MODEL, "float32")
    for name in ("ours", "dense"):
        other = generation.copy_of(models.by_name[name])
        module = next(
            m for m in other.modules() if hasattr(m, "down_rows") or isinstance(getattr(m, "down_proj", None), torch.nn.Linear)
        )
        weight = module.down_rows if name == "ours" else module.down_proj.weight
        wrong = torch.nn.Parameter(weight.flip(-1), requires_grad=False)
        if name == "ours":
            module.down_rows = wrong
        else:
            module.down_proj.weight = wrong
        assert models.by_name[name] is not other
        kept, models.by_name = models.by_name, {"ours": models.by_name["ours"], name + " wrong": other}
        assert models.errors()[name + " wrong"] > 0.01
        models.by_name = kept


@pytest.mark.parametrize("batch", [1, 3])
def test_decode_ends_where_it_began(tiny, batch):
    ids = prompts(tiny.size, batch, 20)
    for name, model in tiny.by_name.items():
        experts = name.removeprefix("transformers-") if name.startswith("transformers-") else None
        decode = Decode(model, ids, experts)
        assert experts in (None, model.config._experts_implementation)
        first = decode()
        assert first.shape == (batch, NEW)
        assert decode.cache.get_seq_length() == 20
        assert torch.equal(decode(), first)
    expected = tiny.by_name["dense"].generate(
        ids, max_new_tokens=NEW + 1, min_new_tokens=NEW + 1, do_sample=False, attention_mask=torch.ones_like(ids)
    )[:, 20:]
    decode = Decode(tiny.by_name["dense"], ids)
    assert torch.equal(torch.cat((decode.first, decode()), 1), expected)


def test_the_prompt_is_not_read_by_batched_mm(tiny, monkeypatch):
    """Its copies of the weights of 512 tokens' slots would take 26 GB in H 2048."""
    model, used = tiny.by_name["transformers-batched_mm"], []
    before = model.set_experts_implementation
    monkeypatch.setattr(model, "set_experts_implementation", lambda name: (used.append(name), before(name))[1])
    Decode(model, prompts(tiny.size, 1, 20), "batched_mm")
    assert used == ["eager", "batched_mm"]


def test_the_bounds():
    """Of one token at a time, as they follow from the shapes: 1.8 and 2.1."""
    for size, expected in ((shapes.SMOLLM2, 1.8), (shapes.H2048, 2.1)):
        assert generation.ratio_of_weights(size, "decode", 1) == pytest.approx(expected, abs=0.05)
        assert 1 < generation.ratio_of_weights(size, "decode", 8) < expected
        assert generation.ratio_of_weights(size, "prefill", 1) > expected  # without the head
    parameters = sum(p.numel() for p in Models(shapes.TINY_MODEL, "float32").by_name["dense"].parameters())
    embedding, norms = shapes.TINY_MODEL.head, (2 * shapes.TINY_MODEL.layers + 1) * shapes.TINY_MODEL.ffn.H
    assert shapes.TINY_MODEL.read(shapes.TINY_MODEL.ffn.E) == parameters - embedding - norms


def test_what_cannot_run_is_skipped_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(generation, "environment", lambda engine: tmp_path / engine)
    case = generation.case(shapes.TINY_MODEL, "float32", "prefill", 1, length=8)
    assert list(case.skipped) == ["llama.cpp"]
    assert "no environment at" in case.skipped["llama.cpp"]
    assert set(case.run) == set(generation.IMPLS) - {"llama.cpp"}
    assert "at most" in case.extra["dense"]["note"]
    (tmp_path / "llama.cpp" / "bin").mkdir(parents=True)
    (tmp_path / "llama.cpp" / "bin" / "python").touch()
    monkeypatch.setattr(generation, "DATA", tmp_path)
    assert "bench.quality fetch" in generation.models(shapes.TINY_MODEL, "float32").llama("f32")
    monkeypatch.setattr(generation, "_MOST_GATHERED", 0.0)
    case = generation.case(shapes.TINY_MODEL, "float32", "decode", 2, length=8)
    assert "copies the weights of every slot" in case.skipped["transformers-batched_mm"]


def test_the_groups_and_a_row():
    groups = _groups()
    assert len({group.name for group in groups}) == len(groups) == 3 + 3 * 2 * 3
    assert all(group.impls == generation.IMPLS for group in groups)
    info = {"status": "same", "tokens": 64, "note": "n"}
    assert report._remarks(info, 0.5) == "128 tokens/s; n"


def test_every_call_of_a_prefill_has_another_prompt():
    seen = []
    several = [prompts(shapes.TINY_MODEL, 1, 8, n) for n in range(3)]
    call = generation.Anew(seen.append, several)
    for _ in range(4):
        call()
    assert all(torch.equal(ids, several[n % 3]) for n, ids in enumerate(seen))
    assert len({tuple(ids.flatten().tolist()) for ids in seen}) == 3
