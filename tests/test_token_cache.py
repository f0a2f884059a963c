"""Token ids on disk: the same as in memory, written once, whole after an interruption or damage, and of no memory."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from test_cli import call, contents, convert_arguments, prose, write_model
from test_cli import here as here
from test_cli import tokenizer as tokenizer
from test_data import make_tokenizer
from test_faults import HINT, assert_same_model, send_at
from tiny import E, K, dense_model, tokens

import dotmoe_kernels as dk
from dotmoe_kernels.alignment import loop
from dotmoe_kernels.alignment.checkpoints import tokens_checksum
from dotmoe_kernels.conversion import DotMoeConfig, data, finetuning, load_tokens, token_cache
from dotmoe_kernels.evaluation import perplexity

WORDS = 7  # of a document, and an end-of-text


class Counting:
    """Tokenises letters; counts its calls, and fails at one of them."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.inner, self.calls, self.fail_at, self.error = make_tokenizer(), 0, fail_at, error
        self.eos_token_id, self.chat_template, self.backend_tokenizer = 0, None, self.inner.backend_tokenizer

    def __call__(self, text, **kwargs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error
        return self.inner(text, **kwargs)

    def get_vocab(self):
        return self.inner.get_vocab()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """40 documents of 8 tokens each; a part has three of them."""
    monkeypatch.setattr(token_cache, "_PART", 3 * (WORDS + 1))
    draw = torch.Generator().manual_seed(0)
    rows = ["".join(chr(97 + i) + " " for i in torch.randint(0, 26, (WORDS,), generator=draw).tolist()) for _ in range(40)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def load(corpus, tokenizer=None, cache=None, **options):
    return load_tokens(corpus, tokenizer or Counting(), **({"sequence_length": 5} | options), cache=cache)


def one(pattern, folder):
    (path,) = folder.rglob(pattern)
    return path


# --- what is read ---------------------------------------------------------------------------------------------------------


def test_the_same_as_in_memory_and_tokenised_once(corpus, tmp_path):
    cache, counting = tmp_path / "cache", Counting()
    expected = load(corpus)
    found = load(corpus, counting, cache)
    assert counting.calls == 40
    assert (found.dtype, expected.dtype) == (torch.int32, torch.int64)
    assert torch.equal(found.long(), expected)
    for options in ({}, {"sequence_length": 8}, {"max_tokens": 100}, {"max_tokens": 7}, {"sequence_length": 11, "max_tokens": 319}):
        assert torch.equal(load(corpus, counting, cache, **options).long(), load(corpus, **options)), options
    assert counting.calls == 40
    index = json.loads(one("index.json", cache).read_text())
    assert index["complete"]
    assert [part[:2] for part in index["parts"]] == [[3, 24]] * 13 + [[1, 8]]
    assert one("tokens.bin", cache).stat().st_size == 4 * 320
    assert one("index.json", cache).stat().st_mode == one("tokens.bin", cache).stat().st_mode  # who may read one reads both


def test_more_tokens_than_before_are_tokenised_on(corpus, tmp_path):
    cache = tmp_path / "cache"
    for most, calls in ((50, 7), (50, 0), (56, 0), (57, 1), (300, 30), (10**6, 2), (10**6, 0), (None, 0)):
        counting = Counting()
        assert torch.equal(load(corpus, counting, cache, max_tokens=most).long(), load(corpus, max_tokens=most))
        assert counting.calls == calls, most


def test_other_text_or_another_tokenizer_is_another_cache(corpus, tmp_path):
    cache = tmp_path / "cache"
    load(corpus, None, cache)
    os.utime(corpus, ns=(1, 1))
    changed = Counting()
    changed.eos_token_id = 1
    for number, given in enumerate((Counting(), changed, Counting()), 2):
        if number == 4:
            corpus.write_text(corpus.read_text() + json.dumps({"text": "a"}) + "\n")
        assert torch.equal(load(corpus, given, cache).long(), load(corpus, given))
        assert len(list(cache.iterdir())) == number


def test_padding_of_an_earlier_call_does_not_make_another_tokenizer():
    one = make_tokenizer()
    before = token_cache.tokenizer_identity(one)
    one.add_special_tokens({"pad_token": "<eos>"})
    padded = token_cache.tokenizer_identity(one)
    one(["a", "a b"], padding=True, truncation=True, max_length=9)
    assert token_cache.tokenizer_identity(one) == padded
    assert token_cache.tokenizer_identity(make_tokenizer()) == before
    assert token_cache.tokenizer_identity(make_tokenizer(eos=False)) != before


def test_a_stream_is_read_no_further_than_needed(tmp_path, monkeypatch):
    """An endless dataset goes into parts, not into a list."""
    taken = []

    def stream(name, field, seed):
        while True:
            taken.append(None)
            yield "a b c"

    monkeypatch.setattr(data, "_hub", stream)
    monkeypatch.setattr(token_cache, "_PART", 8)
    for most, read in ((40, 10), (40, 0), (48, 12)):  # those that are there are passed over
        taken.clear()
        found = load_tokens("some-dataset", Counting(), sequence_length=4, max_tokens=most, cache=tmp_path)
        assert found.tolist() == [[2, 3, 4, 0]] * (most // 4)
        assert len(taken) == read


def test_too_little_text(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"sources is .*corpus.jsonl, 320 tokens; allowed: at least one sequence of 321 tokens"):
        load(corpus, None, tmp_path / "cache", sequence_length=321)
    with pytest.raises(ValueError, match="max_tokens is 4; allowed: at least one sequence, 5, or None"):
        load(corpus, None, tmp_path / "cache", max_tokens=4)


# --- interruptions and damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 5, 7, 40])
def test_an_interruption_costs_a_part_at_the_most(corpus, tmp_path, at):
    cache, counting = tmp_path / "cache", Counting()
    with pytest.raises(KeyboardInterrupt):
        load(corpus, Counting(fail_at=at), cache)
    with one("tokens.bin", cache).open("ab") as file:
        file.write(b"half a part")  # as a kill leaves it
    assert torch.equal(load(corpus, counting, cache).long(), load(corpus))
    assert counting.calls == 40 - (at - 1) // 3 * 3
    assert one("tokens.bin", cache).stat().st_size == 4 * 320


def test_a_damaged_part_is_tokenised_again(corpus, tmp_path):
    cache = tmp_path / "cache"
    load(corpus, None, cache)
    path = one("tokens.bin", cache)
    whole = path.read_bytes()
    for kind, parts in (("bit", 5), ("cut", 5), ("gone", 0)):
        if kind == "gone":
            path.unlink()
        else:
            at = 5 * 24 * 4 + 9
            path.write_bytes(whole[:at] + (bytes([whole[at] ^ 1]) + whole[at + 1 :] if kind == "bit" else b""))
        counting = Counting()
        with pytest.warns(UserWarning, match=f"is damaged after {parts} parts: the rest is tokenised anew"):
            found = load(corpus, counting, cache)
        assert torch.equal(found.long(), load(corpus))
        assert counting.calls == 40 - 3 * parts
        assert path.read_bytes() == whole


@pytest.mark.parametrize("text", ["", "{", "[]", '{"source": {}, "parts": [], "complete": true}'])
def test_a_damaged_index_is_none(corpus, tmp_path, text):
    cache = tmp_path / "cache"
    load(corpus, None, cache)
    one("index.json", cache).write_text(text)
    with pytest.warns(UserWarning, match="is damaged after 0 parts"):
        assert torch.equal(load(corpus, None, cache).long(), load(corpus))


def test_a_reader_keeps_what_it_mapped_while_damage_is_mended(corpus, tmp_path):
    cache = tmp_path / "cache"
    first = load(corpus, None, cache)
    path = one("tokens.bin", cache)
    inode = path.stat().st_ino
    with path.open("r+b") as file:
        file.write(b"\7")
    with pytest.warns(UserWarning, match="is damaged"):
        load(corpus, None, cache)
    assert path.stat().st_ino == inode
    assert torch.equal(first.long(), load(corpus))


def _load_in_a_process(corpus, cache, results, number):
    counting = Counting()
    slow = type(counting).__call__
    Counting.__call__ = lambda self, text, **kwargs: (time.sleep(0.01), slow(self, text, **kwargs))[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it waits
        found = load(corpus, counting, cache)
    results[number] = (counting.calls, int(tokens_checksum(found)))


def test_several_processes_tokenise_once(corpus, tmp_path):
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        processes = [context.Process(target=_load_in_a_process, args=(corpus, tmp_path / "cache", results, n)) for n in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(50)
        found = dict(results)
    assert sorted(calls for calls, _ in found.values()) == [0, 0, 40]
    assert {checksum for _, checksum in found.values()} == {tokens_checksum(load(corpus))}


# --- what is made of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_mark_of_a_text_is_that_of_its_ids(monkeypatch, dtype):
    """In pieces as at once, so that runs of before resume."""
    ids = torch.randint(0, 2**31 - 1, (70, 113), generator=torch.Generator().manual_seed(0))
    at_once = int((ids.flatten() * (torch.arange(ids.numel()) % 1009 + 1)).sum())
    for chunk in (1, 1000, 1009, 1 << 20):
        monkeypatch.setattr("dotmoe_kernels.alignment.checkpoints._CHUNK", chunk)
        assert tokens_checksum(ids.to(dtype)) == at_once


@pytest.mark.parametrize("stages", [("align",), ("reconstruct", "align")])
def test_int32_trains_as_int64(stages):
    text = tokens(24, 16, seed=5)
    states = []
    for given in (text, text.int()):
        model = dk.convert(
            dense_model(),
            DotMoeConfig(num_experts=E, top_k=K),
            data=given,
            alignment=dk.AlignmentConfig(steps=3, batch_size=2, num_iters=5, hidden=1.0, centre=True),
            stages=stages,
            reconstruct_steps=2,
        )
        options = finetuning.FinetuneConfig(steps=2, batch_size=2)
        model = finetuning.finetune(model, given, options, teacher=model, held_out=given[:2])
        states.append((model.state_dict(), model.config.stages, perplexity(model, given[:4])))
    (a, stages_a, x), (b, stages_b, y) = states
    assert x == y
    assert stages_a == stages_b
    assert all(torch.equal(a[name], b[name]) for name in a)


MEMORY = """
import sys, threading, time
import numpy as np, torch
import dotmoe_kernels as dk
from dotmoe_kernels.conversion import DotMoeConfig, load_tokens
from dotmoe_kernels.conversion import data
sys.path.insert(0, sys.argv[1])
from tiny import E, K, V, dense_model

COUNT, DOCUMENT = 20_000_000, 50_000
class Fake:
    eos_token_id, chat_template = None, None
    def get_vocab(self): return {}
    def __call__(self, text, **kwargs):
        return {"input_ids": np.random.default_rng(int(text)).integers(3, V, DOCUMENT).tolist()}
data._hub = lambda *args: (str(n) for n in range(COUNT // DOCUMENT))

def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
model = dense_model()
peak, done = [held()], threading.Event()
def watch():
    while not done.wait(0.002):
        peak.append(held())
before = held()
threading.Thread(target=watch, daemon=True).start()
cache = None if sys.argv[2] == "none" else sys.argv[2]
tokens = load_tokens("some-dataset", Fake(), sequence_length=64, cache=cache)
assert tokens.numel() == COUNT // 64 * 64, tokens.shape
options = dk.AlignmentConfig(steps=3, batch_size=2, num_iters=5)
model = dk.convert(model, DotMoeConfig(num_experts=E, top_k=K), data=tokens, alignment=options)
dk.finetune(model, tokens, dk.FinetuneConfig(steps=2, batch_size=2))
done.set()
print(max(peak) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux how much memory is held")
def test_a_corpus_takes_no_memory(tmp_path):
    """20 million tokens, 80 MB on disk and 160 MB in memory, through tokenising, alignment and fine-tuning."""
    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parent), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert one("tokens.bin", tmp_path).stat().st_size == 80_000_000
    assert float(done.stdout) < 50, done.stdout  # MB: a part of 16, the order of the rows, what a tiny model takes


# --- the command ----------------------------------------------------------------------------------------------------------


def test_a_token_cache_serves_several_runs(capsys, here, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    assert call(capsys, *convert_arguments(here, tmp_path / "plain"))[0] == 0
    assert not list(tmp_path.rglob("tokens.bin"))  # of a run they go with its checkpoints
    assert call(capsys, *convert_arguments(here, tmp_path / "a", "--token-cache", cache))[0] == 0
    before = contents(cache)
    assert {name.split("/")[1] for name in before} == {"lock", "index.json", "tokens.bin"}
    with monkeypatch.context() as patch:
        patch.setattr(data, "_encode", None)
        assert call(capsys, *convert_arguments(here, tmp_path / "b", "--token-cache", cache))[0] == 0
    assert contents(cache) == before
    assert_same_model(tmp_path / "a", tmp_path / "plain")
    assert_same_model(tmp_path / "b", tmp_path / "plain")


def test_a_run_that_resumes_does_not_tokenise_again(capsys, here, tmp_path, monkeypatch):
    arguments = convert_arguments(here, tmp_path / "moe")
    with monkeypatch.context() as patch:
        send_at(patch, loop, 2)
        assert call(capsys, *arguments)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(data, "_encode", None)
        assert call(capsys, *arguments, "--resume")[0::2] == (0, "")
    assert [p.name for p in (tmp_path / "moe.run").iterdir()] == ["log.jsonl"]


def test_sigterm_while_tokenising_keeps_the_parts(capsys, here, tmp_path, monkeypatch):
    rows = [prose(3, seed=n) for n in range(20)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    arguments = convert_arguments(here, tmp_path / "moe")
    arguments[3] = tmp_path / "text.jsonl"
    monkeypatch.setattr(token_cache, "_PART", 100)
    real, count = data._encode, iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(data, "_encode", lambda *args: (next(count) == 12 and os.kill(os.getpid(), 15), real(*args))[1])
        status, _, err = call(capsys, *arguments)
    assert (status, err) == (0, f"dotmoe convert: stopped before the next step{HINT}")
    kept = sum(part[0] for part in json.loads(one("index.json", tmp_path / "moe.run").read_text())["parts"])
    assert 6 <= kept <= 11
    calls = []
    monkeypatch.setattr(data, "_encode", lambda *args: (calls.append(None), real(*args))[1])
    assert call(capsys, *arguments, "--resume")[0] == 0
    assert len(calls) == 20 - kept


def test_no_room_for_the_token_ids(capsys, here, tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert err == f"dotmoe convert: error: [Errno {errno.EFBIG}] File too large; with more room {HINT[2:]}"
    assert call(capsys, *convert_arguments(here, tmp_path / "moe"), "--resume")[0] == 0


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("{0}/moe/cache", "--token-cache is {0}/moe/cache, which is not apart from {0}/moe of --output; allowed: another folder"),
        ("{0}/text/cache", "--token-cache is {0}/text/cache, which lies in {0}/text of --data; allowed: another folder"),
        ("{0}/file", "--token-cache is {0}/file, which cannot be written to"),
        ("", "--token-cache is ''; allowed: a folder"),
    ],
    ids=["in the output", "in the text", "a file", "nothing"],
)
def test_a_token_cache_in_a_wrong_place(capsys, here, tmp_path, cache, message):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(prose(60))
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    arguments = convert_arguments(here, tmp_path / "moe", "--token-cache", cache.format(tmp_path))
    arguments[3] = tmp_path / "text"
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert message.format(tmp_path) in err
    assert contents(tmp_path) == before


def test_text_that_is_refused_leaves_nothing(capsys, here, tmp_path, tokenizer):
    write_model(tmp_path / "small", tokenizer, vocab_size=100)
    before = contents(tmp_path)
    arguments = convert_arguments(here, tmp_path / "moe")
    arguments[1] = tmp_path / "small"
    assert call(capsys, *arguments)[0] == 2
    assert contents(tmp_path) == before
    assert not (tmp_path / "moe.run").exists()


def test_text_that_is_refused_leaves_what_was_there(capsys, here, tmp_path, monkeypatch):
    """A typo does not cost the token ids of an interrupted run."""
    arguments = convert_arguments(here, tmp_path / "moe")
    with monkeypatch.context() as patch:
        patch.setattr("dotmoe_kernels.evaluation.perplexity", lambda *args, **kwargs: os.kill(os.getpid(), 15))
        assert call(capsys, *arguments)[0] == 0
    before = contents(tmp_path)
    assert any(name.endswith("tokens.bin") for name in before)
    arguments[arguments.index("--sequence-length") + 1] = "100000"
    assert call(capsys, *arguments)[0] == 2
    assert contents(tmp_path) == before
