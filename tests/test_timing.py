"""`dotmoe bench`: what is timed, in which order, what the report and the model card say of it, and what is refused."""

import json
import stat

import pytest
import torch
from tiny import E, F, H, K, V, sparse_model

import dotmoe_kernels as dk
from dotmoe_kernels import _files, cli
from dotmoe_kernels.conversion import moe_blocks, restore_dense, timing
from dotmoe_kernels.models.card import put_section

SHORT = ("--prompt-tokens", "9", "--new-tokens", "3", "--rounds", "2", "--batch", "1,2", "--device", "cpu")


@pytest.fixture
def folder(tmp_path):
    dk.save(sparse_model(), tmp_path / "moe")
    return tmp_path / "moe"


def bench(capsys, *arguments):
    capsys.readouterr()  # of transformers' bars
    status = cli.main(["bench", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_report(capsys, folder):
    status, out, err = bench(capsys, folder, *SHORT, "--json", "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert (report["dtype"], report["device"], report["rounds"]) == ("bfloat16", "cpu", 2)
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["topology"] == {"num_experts": E, "top_k": K, "expert_size": F // E}
    layers, router = 2, 2 * E * H  # bytes
    assert report["weight_bytes"]["sparse"] - report["weight_bytes"]["dense"] == layers * router
    assert [one["batch"] for one in report["batches"]] == [1, 2]
    for one in report["batches"]:
        for phase in ("prefill", "decode"):
            found = one[phase]
            for spread in (*found["tokens_per_second"].values(), found["sparse_over_dense"]):
                low, high = spread["quartiles"]
                assert 0 < low <= spread["median"] <= high
            assert all(0 < share < 1 for share in found["ffn_share"].values())
            assert found["at_most"] > 1
        assert set(one["peak_bytes"]) == {"dense", "sparse"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_bounds(tied):
    """Of a LLaMA with 4 heads and 2 of keys: what is read of it, by hand."""
    model = sparse_model(tie_word_embeddings=tied)
    attention, norms = 2 * H * 4 * 8 + 2 * H * 2 * 8, 2 * H
    others, ffn, router = 2 * (attention + norms) + H, 2 * 3 * F * H, 2 * E * H
    found = timing.bounds(model, 3)
    chosen = ffn * (1 - (1 - K / E) ** 3)
    assert found["decode"] == pytest.approx((others + V * H + ffn) / (others + V * H + router + chosen))
    assert found["prefill"] == pytest.approx((others + ffn) / (others + router + ffn * K / E))


def test_a_generation_is_the_models_own():
    """A pass over the prompt, then a token at a time with the cache: the ids that ``generate`` gives."""
    model, seen = sparse_model().eval(), []
    model.generation_config.eos_token_id = None
    prompt = torch.arange(3, 12)[None]
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    phases = []
    seconds = timing.generation_seconds(model, prompt, 4, phases.append)
    handle.remove()
    assert [ids.shape[1] for ids in seen] == [9, 1, 1, 1, 1]
    assert torch.equal(torch.cat(seen, 1), expected[:, :-1])
    assert phases == list(seconds) == ["prefill", "decode"]
    assert all(value > 0 for value in seconds.values())


def test_the_models_take_turns_and_ratios_are_of_a_round(monkeypatch):
    """A machine that gets ten times as slow in the last round: the ratio of the two stays."""
    order, seen, model = [], [], sparse_model()
    taken = iter([1.0, 0.5, 0.5, 1.0, 10.0, 5.0])  # dense sparse, sparse dense, dense sparse

    def generation(one, prompts, new_tokens, done=None):
        if done is None and (prompts.shape[1], new_tokens) == (9, 7):
            order.append("sparse" if moe_blocks(one) else "dense")
            seen.append(prompts)
            value = next(taken)
            return {"prefill": value, "decode": value}
        for phase in timing.PHASES if done else ():
            done(phase)
        return {"prefill": 1.0, "decode": 1.0}

    monkeypatch.setattr(timing, "generation_seconds", generation)
    report = timing.measure_speed(model, prompt_tokens=9, new_tokens=7, batches=[2], rounds=3)
    assert order == ["dense", "sparse", "sparse", "dense", "dense", "sparse"]
    rounds = [seen[n : n + 2] for n in (0, 2, 4)]
    assert all(torch.equal(*pair) for pair in rounds)
    assert not torch.equal(seen[0], seen[2])  # what was compiled for a prompt's routing is not there for the next
    assert not torch.equal(seen[2], seen[4])
    (one,) = report["batches"]
    assert one["prefill"]["sparse_over_dense"] == {"median": 2.0, "quartiles": [2.0, 2.0]}
    assert one["prefill"]["tokens_per_second"]["dense"]["median"] == 2 * 9
    assert one["decode"]["tokens_per_second"]["sparse"]["median"] == 2 * 7 / 0.5


def test_the_share_is_of_the_ffns_alone(monkeypatch):
    """With a clock that moves in an FFN alone all of a pass is FFN, with one that moves in attention nothing."""
    model, now = sparse_model(), [0.0]
    dense = restore_dense(model)
    names = list(moe_blocks(model))
    monkeypatch.setattr(timing, "_clock", lambda device: lambda: now[0])

    def advance(*_):
        now[0] += 1

    for one in (model, dense):
        for inside, expected in ((".act_fn" if one is dense else ".gate", 1.0), (".self_attn", 0.0)):
            hooked = [m.register_forward_hook(advance) for name, m in one.named_modules() if name.endswith(inside)]
            assert hooked
            assert timing.ffn_shares(one, names, torch.arange(3, 12)[None], 2) == {"prefill": expected, "decode": expected}
            for handle in hooked:
                handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for one in (model, dense) for m in one.modules())


def test_the_memory_of_a_prefill_grows_with_the_prompt():
    from dotmoe_kernels.conversion.machine import peak_memory

    with peak_memory(torch.device("cpu")) as peak:
        kept = torch.ones(8_000_000)
        del kept
        found = peak()
    assert found is None or 28e6 < found < 64e6


# --- the card -----------------------------------------------------------------------------------------------------------


def test_the_card_has_the_table_once(capsys, folder):
    path = folder / "README.md"
    before = path.read_text()
    path.write_text(before + "\n## Mine\n\nkept\n")
    path.chmod(0o644)
    for _ in range(2):
        status, out, _ = bench(capsys, folder, *SHORT, "--card")
        assert status == 0
        text = path.read_text()
        assert text.count("## Speed") == 1
        assert text.index("## Speed") < text.index("## Use") < text.index("## Mine\n\nkept")
        assert text.split("## Speed")[0].strip() == before.split("## Use")[0].strip()
        assert text.count("| decode |") == 2
        cells = next(line for line in text.splitlines() if line.startswith("| 2 | decode |")).split(" | ")
        assert cells[4] in out  # the ratio with its quartiles
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_dotmoe.py"]
    )
    path.unlink()
    assert bench(capsys, folder, *SHORT, "--card")[0] == 0
    assert "## Speed" in path.read_text()
    assert dk.load(folder).config.num_experts == E


def test_a_card_that_cannot_be_written_stays_as_it_was(capsys, folder, monkeypatch):
    before, calls = (folder / "README.md").read_text(), []

    def full(source, target):
        calls.append(target)
        raise OSError(28, "No space left on device")

    real = timing.measure_speed

    def measure(*args, **kwargs):
        monkeypatch.setattr(_files.os, "replace", full)  # the probe before it went well
        return real(*args, **kwargs)

    monkeypatch.setattr(timing, "measure_speed", measure)
    status, _, err = bench(capsys, folder, *SHORT, "--card")
    assert (status, len(err.splitlines()), len(calls)) == (2, 1, 1)
    assert "No space left" in err
    assert (folder / "README.md").read_text() == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "## S\n\nnew\n"),
        ("# T\n\na\n", "# T\n\na\n\n## S\n\nnew\n"),
        ("# T\n\n## Use\n\nu\n", "# T\n\n## S\n\nnew\n\n## Use\n\nu\n"),
        ("## S\n\nold\n\n### of it\n\n## A\n\n## A\n", "## S\n\nnew\n\n## A\n\n## A\n"),
        ("## A\n\n## S\nold\n## A\nlast\n", "## A\n\n## S\n\nnew\n\n## A\nlast\n"),
        ("a\n```\n## S\n```\n", "a\n```\n## S\n```\n\n## S\n\nnew\n"),
        ("## S\n```\n# c\n```\n# T\n", "## S\n\nnew\n\n# T\n"),
    ],
)
def test_a_section_takes_its_place(text, expected):
    assert put_section(text, "S", "new") == expected
    assert put_section(expected, "S", "new") == expected


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", "1,x"), "--batch is '1,x'; allowed: integers of at least 1"),
        (("--batch", "1,2.5"), "--batch is '1,2.5'"),
        (("--batch", "0"), "--batch is '0'"),
        (("--batch", ""), "--batch is ''"),
        (("--prompt-tokens", "65"), "--prompt-tokens is 65; allowed: at most max_position_embeddings, 64"),
        (
            ("--prompt-tokens", "60", "--new-tokens", "5"),
            "--new-tokens is 5 after a prompt of 60; allowed: max_position_embeddings, 64",
        ),
        (("--prompt-tokens", "0"), "--prompt-tokens is 0"),
        (("--new-tokens", "-1"), "--new-tokens is -1"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--seed", str(1 << 40)), "--seed is"),
        (("--device", "tpu"), "--device is 'tpu'"),
    ],
)
def test_refusals(capsys, folder, arguments, words):
    status, out, err = bench(capsys, folder, *arguments)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(f"dotmoe bench: error: {words}")


def test_an_unknown_dtype_is_refused(capsys, folder):
    with pytest.raises(SystemExit) as ended:
        bench(capsys, folder, "--dtype", "int8")
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "int8" in err


def test_models_and_cards_that_are_refused(capsys, folder, tmp_path):
    restore_dense(dk.load(folder)).save_pretrained(tmp_path / "dense")
    dk.save(sparse_model(), tmp_path / "latin")
    (tmp_path / "latin" / "README.md").write_bytes("für".encode("latin-1"))
    dk.save(sparse_model(), tmp_path / "taken")
    (tmp_path / "taken" / "README.md").unlink()
    (tmp_path / "taken" / "README.md").mkdir()
    for arguments, words in (
        ((tmp_path / "dense",), f"MODEL is {tmp_path / 'dense'}, whose model_type is 'llama'; allowed: a folder written by"),
        ((tmp_path / "gone", "--card"), f"MODEL is {tmp_path / 'gone'}, which does not exist; allowed: a folder written by"),
        (("",), "MODEL is '', which does not exist"),
        ((tmp_path / "latin", "--card", *SHORT), f"--card is given with {tmp_path / 'latin' / 'README.md'}, which is not in UTF-8"),
        ((tmp_path / "taken", "--card", *SHORT), f"--card is given with {tmp_path / 'taken' / 'README.md'}, a folder"),
    ):
        status, out, err = bench(capsys, *arguments)
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith(f"dotmoe bench: error: {words}")
