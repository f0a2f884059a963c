"""What the commands take: text of every kind, a tokenizer of one's own, dense models to measure; and flags that nothing reads."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from test_cli import S, V, assert_one_line, call, contents, convert_arguments, prose, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import dotmoe_kernels as dk
from dotmoe_kernels import cli
from dotmoe_kernels.cli.commands import _bars
from dotmoe_kernels.conversion import load_tokens
from dotmoe_kernels.conversion.demo import train_tokenizer
from dotmoe_kernels.conversion.recipes import load_recipe
from dotmoe_kernels.evaluation import perplexity


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """dense/, moe/, bare/ (a converted model without a tokenizer), tokens/, text.txt, held.txt; read only."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = train_tokenizer([prose(60)], vocab_size=V)
    write_model(folder / "dense", tokenizer)
    tokenizer.save_pretrained(folder / "tokens")
    (folder / "text.txt").write_text(prose(60))
    (folder / "held.txt").write_text(prose(20, seed=1))
    assert cli.main(convert_arguments(folder, folder / "moe")) == 0
    dk.save(dk.load(folder / "moe"), folder / "bare")
    return folder


def in_subprocess(*arguments, **environment):
    command = [sys.executable, "-m", "dotmoe_kernels", *map(os.fspath, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, capture_output=True, timeout=300, env=environment, check=False)


def evaluate(here, *extra, model="moe", data="held.txt"):
    return ("eval", here / model, "--data", here / data, "--sequence-length", S, *extra)


# --- data -------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_data(capsys, here, tmp_path):
    """All of it is read, but for what is hidden, and that is said in one line."""
    data = tmp_path / "data"
    (data / ".git").mkdir(parents=True)
    (data / ".git" / "x.txt").write_text(prose(60, seed=5))
    (data / "README.md").write_text(prose(30))
    (data / "train.json.gz").write_bytes(gzip.compress(json.dumps([{"text": prose(30, seed=3)}]).encode()))
    status, out, err = call(capsys, *convert_arguments(here, tmp_path / "moe", data=data))
    assert status == 0
    assert err == f"dotmoe convert: warning: {data}: 2 files are read, 1 passed over: 1 hidden (.git/)\n"
    tokenizer = AutoTokenizer.from_pretrained(here / "dense")
    read = load_tokens([data / "README.md", data / "train.json.gz"], tokenizer, sequence_length=S)
    count = len(read) - max(len(read) // 20, 1)
    assert f"data: {count * S:,} tokens to train on" in out


@pytest.mark.parametrize("command", ["convert", "eval"])
def test_chat_messages(capsys, here, tmp_path, command):
    rows = [{"c": {"m": [{"role": "user", "content": prose(4, seed=n)}]}} for n in range(12)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(here / "dense")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokens")
    plain = tmp_path / "plain.jsonl"
    plain.write_text("\n".join(json.dumps({"text": row["c"]["m"][0]["content"]}) for row in rows))
    flags = ("--text-field", "c.m")
    arguments = {"convert": convert_arguments(here, tmp_path / "moe", *flags, data=tmp_path / "x.jsonl")}
    arguments["eval"] = evaluate(here, *flags, data=tmp_path / "x.jsonl")
    status, out, err = call(capsys, *arguments[command])
    message = "--text-field is 'c.m', chat messages in line 1 of "
    assert_one_line(status, err, command, message)
    assert "without a chat template; allowed: a field of text, or a tokenizer with a template" in err
    assert not (tmp_path / "moe").exists()
    status, out, err = call(capsys, *arguments[command], "--tokenizer", tmp_path / "tokens")
    assert (status, err) == (0, "")
    same = {"convert": convert_arguments(here, tmp_path / "same", data=plain), "eval": evaluate(here, data=plain)}[command]
    assert call(capsys, *same)[1].splitlines()[:2] == out.splitlines()[:2]
    if command == "convert":  # what was read with goes along
        assert AutoTokenizer.from_pretrained(tmp_path / "moe").chat_template == tokenizer.chat_template


@pytest.mark.parametrize("command", ["convert", "eval", "demo"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "\\ud800"}', "is line 1 of {}, with half of a surrogate pair"),
        ("x.jsonl", b"[" * 200_000, "is {}, which is no JSON in line 1 (maximum recursion"),
        ("x.json", b'[{"text": "a"}', "is {}, which is no JSON ("),
        ("x.txt.gz", gzip.compress(b"a b", mtime=0)[:-3], "is {}, which cannot be read (Compressed file ended"),
        ("x.txt.zst", b"a b", "is {}, which cannot be read ("),
        ("x.parquet", b"PAR1PAR1", "is {}, which cannot be read ("),
        ("x.csv", b"a,b", "is {}; allowed: files ending in .txt"),
    ],
)
def test_data_that_is_broken(capsys, here, tmp_path, command, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    before = contents(tmp_path)
    arguments = {
        "convert": convert_arguments(here, tmp_path / "moe", data=path),
        "eval": evaluate(here, data=path),
        "demo": ("demo", "--quick", "--data", path, "--output", tmp_path / "demo"),
    }[command]
    status, out, err = call(capsys, *arguments)
    assert_one_line(status, err, command, ": error: --data " + message.format(path))
    assert out == ""
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == [name]


# --- text that is none --------------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_no_text(capsys, here):
    status, out, err = call(capsys, "generate", here / "moe", "--prompt", "the \ud800")
    assert_one_line(status, err, "generate", r"--prompt is 'the \ud800'; allowed: text in UTF-8")
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("convert", "dense", "--data", "x\udcff.txt", "--output", "moe"), "--data"),
        (("convert", "dense", "--data", "x.txt", "--output", "moe\udcff"), "--output"),
        (("eval", "moe\udcff", "--data", "x.txt"), "MODEL"),
        (("eval", "moe", "--data", "a.txt", "x.txt", "--text-field", "\udcff"), "--text-field"),
        (("info", "moe\udcff"), "MODEL"),
        (("demo", "--output", "\udcff"), "--output"),
        (("generate", "moe", "--prompt", "x", "--tokenizer", "\udcff"), "--tokenizer"),
    ],
)
def test_arguments_that_are_no_text(capsys, tmp_path, monkeypatch, arguments, name):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys, *arguments)
    assert_one_line(status, err, arguments[0], f"{name} is '")
    assert r"\udcff" in err
    assert err.endswith("'; allowed: text in UTF-8\n")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_bytes_on_the_command_line(here):
    done = in_subprocess("generate", here / "moe", "--prompt", b"the \xff")
    assert done.returncode == 2
    assert done.stderr == b"dotmoe generate: error: --prompt is 'the \\udcff'; allowed: text in UTF-8\n"


# --- where only ASCII can be shown --------------------------------------------------------------------------------------------


def test_eval_where_only_ascii_can_be_shown(here):
    done = in_subprocess(*map(str, evaluate(here)), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("ascii")
    assert text.splitlines()[-1].endswith("@")  # every token has the two experts


def test_generate_where_only_ascii_can_be_shown(here):
    done = in_subprocess("generate", here / "moe", "--prompt", "the é", "--max-new-tokens", "1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(rb"the \xe9")


def test_help_where_only_ascii_can_be_shown():
    for command in ("demo", "convert", "eval", "generate", "bench", "info"):
        done = in_subprocess(command, "--help", PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, b"")


def test_the_bars(monkeypatch):
    assert _bars([0, 1, 4, 8]) == " ▂▅█"
    with open(os.devnull, "w", encoding="ascii") as narrow, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", narrow)
        assert _bars([0, 1, 4, 8]) == " :+@"


# --- a tokenizer of one's own -------------------------------------------------------------------------------------------------


def test_the_commands_take_a_tokenizer(capsys, here, tmp_path):
    flag = ("--tokenizer", here / "tokens")
    own, given = (call(capsys, *arguments)[1] for arguments in (evaluate(here), evaluate(here, *flag, model="bare")))
    assert own.splitlines()[1:] == given.splitlines()[1:] != []
    prompt = ("--prompt", "the router", "--max-new-tokens", 5)
    expected = call(capsys, "generate", here / "moe", *prompt)
    assert expected[0] == 0
    assert call(capsys, "generate", here / "bare", *prompt, *flag) == expected
    dense = tmp_path / "dense"
    AutoModelForCausalLM.from_pretrained(here / "dense").save_pretrained(dense)
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", model=dense))
    assert_one_line(status, err, "convert", f"{dense} has no tokenizer that can be read; allowed: a MODEL saved with one, as save(")
    assert "or --tokenizer (" in err
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *flag, model=dense))
    assert (status, err) == (0, "")
    a, b = dk.load(tmp_path / "moe").state_dict(), dk.load(here / "moe").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert call(capsys, "generate", tmp_path / "moe", *prompt) == expected


@pytest.mark.parametrize("command", ["convert", "eval", "generate", "eval dense"])
@pytest.mark.parametrize("case", ["", "./not there", "dense without", "broken", "list", "deep", "more ids"])
def test_a_tokenizer_that_is_none(capsys, here, tmp_path, command, case):
    folder = tmp_path / "tokens" if case not in ("", "./not there") else case
    message = f"--tokenizer {folder} has no tokenizer that can be read; allowed: a folder with one, or a name ("
    if case == "more ids":
        tokenizer = AutoTokenizer.from_pretrained(here / "tokens")
        tokenizer.add_tokens(["the"])
        tokenizer.save_pretrained(folder)
        message = f"--tokenizer is {folder}, which gives ids up to {V}; allowed: ids below the vocabulary of MODEL, {V}"
    elif case == "":
        message = "--tokenizer is ''; allowed: a folder with a tokenizer, or a name"
    elif case != "./not there":
        AutoTokenizer.from_pretrained(here / "tokens").save_pretrained(folder)
        broken = {"broken": b"{", "list": b"[1]", "deep": b"[" * 200_000}.get(case)
        for file in folder.iterdir():
            if case == "dense without":
                file.unlink()
            else:
                file.write_bytes(broken)
    arguments = {
        "convert": convert_arguments(here, tmp_path / "moe"),
        "eval": evaluate(here),
        "eval dense": evaluate(here, model="dense"),
        "generate": ("generate", here / "moe", "--prompt", "the"),
    }[command]
    status, out, err = call(capsys, *arguments, "--tokenizer", folder)
    assert_one_line(status, err, command.split()[0], message)
    assert out == ""
    assert not (tmp_path / "moe").exists()


def test_output_never_replaces_the_tokenizer(capsys, here, tmp_path):
    """Its own folder, or one in the model that is to be replaced."""
    shutil.copytree(here / "moe", tmp_path / "moe")
    shutil.copytree(here / "tokens", tmp_path / "moe" / "tokens")
    before = contents(tmp_path)
    for folder in (tmp_path / "moe", tmp_path / "moe" / "tokens"):
        status, out, err = call(capsys, *convert_arguments(here, tmp_path / "moe", "--overwrite", "--tokenizer", folder))
        assert_one_line(status, err, "convert", "--tokenizer")
        assert contents(tmp_path) == before


# --- eval of a dense model ----------------------------------------------------------------------------------------------------


def test_eval_of_a_dense_model(capsys, here):
    model = AutoModelForCausalLM.from_pretrained(here / "dense").eval()
    tokens = load_tokens([here / "held.txt"], AutoTokenizer.from_pretrained(here / "dense"), sequence_length=S)
    value, total = perplexity(model, tokens), model.num_parameters()
    status, out, err = call(capsys, *evaluate(here, model="dense"))
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"{here / 'dense'} on {tokens.numel():,} tokens: a dense model",
        f"perplexity: {value:.3f}",
        f"parameters: {total:,}, all of them active",
    ]
    status, out, err = call(capsys, *evaluate(here, "--json", model="dense"))
    assert (status, err) == (0, "")
    report = json.loads(out)
    assert report.pop("perplexity_dense") == pytest.approx(value, rel=1e-5)
    assert report == {
        "model": str(here / "dense"),
        "kind": "dense",
        "data": [str(here / "held.txt")],
        "tokens": tokens.numel(),
        "total_parameters": total,
        "active_parameters": total,
    }
    sparse = json.loads(call(capsys, *evaluate(here, "--json"))[1])
    assert sparse["kind"] == "dotmoe"
    assert sparse["path"] == "auto"
    assert sparse["perplexity_dense"] == pytest.approx(value, rel=1e-4)
    half = json.loads(call(capsys, *evaluate(here, "--json", "--dtype", "bfloat16", model="dense"))[1])
    assert half["perplexity_dense"] != value
    assert half["perplexity_dense"] == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("path", ["auto", "masked"])
def test_eval_of_a_dense_model_has_no_path(capsys, here, path):
    status, out, err = call(capsys, *evaluate(here, "--path", path, model="dense"))
    assert_one_line(status, err, "eval", f"--path is {path}; allowed: none: MODEL is dense, and has no experts")
    assert out == ""


@pytest.mark.parametrize("case", ["sparse", "no weights", "cut off", "unknown", "deep"])
def test_eval_of_what_is_neither(capsys, here, tmp_path, case):
    tokenizer = AutoTokenizer.from_pretrained(here / "tokens")
    if case == "sparse":
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MixtralConfig(vocab_size=V, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
        MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    else:
        write_model(tmp_path / "model", tokenizer)
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    if case == "no weights":
        weights.unlink()
    if case == "cut off":
        weights.write_bytes(weights.read_bytes()[:-99])
    if case == "unknown":
        config.write_text('{"model_type": "none that is known"}')
    if case == "deep":
        config.write_text("[" * 200_000)
    message = {
        "sparse": "MODEL is MixtralForCausalLM, which is already sparse (num_experts = 4); allowed: a dense model",
        "no weights": "MODEL is {}, without weights",
        "cut off": "{}/model.safetensors cannot be read (",
        "unknown": "none that is known",
        "deep": "{}",
    }[case]
    status, out, err = call(capsys, *evaluate(tmp_path, model="model", data=here / "held.txt"))
    assert_one_line(status, err, "eval", message.format(tmp_path / "model"))
    assert out == ""


def test_generate_is_of_converted_models(capsys, here):
    status, out, err = call(capsys, "generate", here / "dense", "--prompt", "the")
    message = "whose model_type is 'llama'; allowed: a folder written by dotmoe_kernels.save"
    assert_one_line(status, err, "generate", f"MODEL is {here / 'dense'}, {message}")


BROKEN = {
    "list": b"[1]",
    "number": b"3",
    "null": b"null",
    "string": b'"x"',
    "object": b"{}",
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "no JSON": b"{",
    "binary": bytes(range(256)),
    "empty": b"",
    "map of numbers": b'{"weight_map": {"lm_head.weight": 3}}',
    "empty map": b'{"weight_map": {}}',
}


@pytest.fixture(scope="module")
def shards(here, tmp_path_factory):
    """dense/ and moe/ in several files of weights."""
    folder = tmp_path_factory.mktemp("shards")
    tokenizer = AutoTokenizer.from_pretrained(here / "dense")
    AutoModelForCausalLM.from_pretrained(here / "dense").save_pretrained(folder / "dense", max_shard_size="20KB")
    tokenizer.save_pretrained(folder / "dense")
    dk.save(dk.load(here / "moe"), folder / "moe", tokenizer=tokenizer, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("content", BROKEN)
def test_a_model_whose_json_is_broken(capsys, here, shards, tmp_path, name, model, content):
    """What transformers and tokenizers raise for it is of every type."""
    shutil.copytree(shards / model, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(BROKEN[content])
    commands = {"info": ("info", tmp_path / "model"), "eval": evaluate(tmp_path, model="model", data=here / "held.txt")}
    if model == "dense":
        commands["convert"] = convert_arguments(here, tmp_path / "out", model=tmp_path / "model", data="missing.txt")
    else:
        commands["generate"] = ("generate", tmp_path / "model", "--prompt", "the", "--max-new-tokens", 1)
    for command, arguments in commands.items():
        status, _, err = call(capsys, *arguments)
        if status or command == "convert":  # generation's settings may be empty, say, and info reads no weights
            assert_one_line(status, err, command, "")
    assert not (tmp_path / "out").exists()


# --- flags that nothing reads -------------------------------------------------------------------------------------------------


SOFT = {
    "--router-temperature-start": "0.2",
    "--router-temperature-end": "0.1",
    "--threshold": "0.1",
    "--cap": "1.5",
    "--budget-lr": "0.1",
}
DOT = {"--init": "kmeans", "--affinity-lr": "0.1", "--tau-start": "2.0", "--tau-end": "0.2", "--refresh-every": "2"}


@pytest.mark.parametrize("flag", SOFT)
@pytest.mark.parametrize("extra", [(), ("--router", "top_k"), ("--dry-run",)], ids=["", "top_k", "dry run"])
def test_a_flag_of_the_soft_router_without_it(capsys, here, tmp_path, flag, extra):
    status, out, err = call(capsys, *convert_arguments(here, tmp_path / "moe", flag, SOFT[flag], *extra))
    assert_one_line(status, err, "convert", f": error: {flag} is {SOFT[flag]}; allowed: together with --router soft")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", DOT)
@pytest.mark.parametrize("method", ["random", "kmeans", "activation"])
def test_a_flag_of_dot_beside_another_method(capsys, here, tmp_path, flag, method):
    arguments = convert_arguments(here, tmp_path / "moe", flag, DOT[flag], "--method", method)
    status, out, err = call(capsys, *arguments)
    assert_one_line(status, err, "convert", f": error: {flag} is {DOT[flag]}; allowed: together with --method dot")
    assert out == ""
    assert list(tmp_path.iterdir()) == []
    status, _, err = call(capsys, *arguments, "--dry-run")
    assert_one_line(status, err, "convert", "together with --method dot")


@pytest.mark.parametrize("flags", [("--init", "noise"), ("--init", "kmeans"), ("--method", "activation")], ids=" ".join)
def test_shared_experts_of_another_start(capsys, here, tmp_path, flags):
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", "--shared", "1", *flags))
    wanted = ": error: --shared is 1; allowed: together with --init shared or --method shared"
    assert_one_line(status, err, "convert", wanted)


@pytest.mark.parametrize(("shared", "allowed"), [("-1", "an integer of at least 0, or None"), ("9", "at most K = 2")])
def test_a_number_of_shared_experts_out_of_range(capsys, here, tmp_path, shared, allowed):
    arguments = convert_arguments(here, tmp_path / "moe", "--init", "shared", "--shared", shared, "--top-k", "2")
    status, _, err = call(capsys, *arguments)
    assert_one_line(status, err, "convert", f"--shared is {shared}; allowed: {allowed}")


def test_the_same_flags_together(capsys, here, tmp_path):
    soft = [part for pair in SOFT.items() for part in pair]
    dot = [part for pair in DOT.items() for part in pair]
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *soft, *dot, "--router", "soft", "--method", "dot"))
    said = [line for line in err.splitlines() if "leave experts without a token" not in line]  # of so short a run
    assert (status, said) == (0, [])
    assert dk.load(tmp_path / "moe").config.router_cap == 1.5


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("[alignment]\ncap = 1.5", (), "cap in recipe {} is 1.5; allowed: together with --router soft"),
        ('[topology]\nrouter = "top_k"\n[alignment]\nthreshold = 0.1', (), "threshold in recipe {} is 0.1; allowed: together with"),
        ("[alignment]\ncap = 1.5", ("--router", "soft"), None),
        ('[topology]\nrouter = "soft"\n[alignment]\ncap = 1.5', (), None),
        ('[topology]\nrouter = "soft"\n[alignment]\ncap = 1.5', ("--router", "top_k"), None),
        ('[topology]\nrouter = "soft"', ("--router", "top_k", "--cap", "2"), "--cap is 2.0; allowed: together with --router soft"),
        ('[topology]\nrouter = "soft"', ("--cap", "2"), None),
        ('[alignment]\ninit = "kmeans"', (), None),
        ('[alignment]\ninit = "kmeans"', ("--method", "random"), "init in recipe {} is kmeans; allowed: together with"),
        ('[alignment]\ninit = "kmeans"', ("--method", "random", "--init", "noise"), "--init is noise; allowed: together with"),
        ("[alignment]\ntau_end = 0.2\naffinity_lr = 0.1", ("--method", "random"), None),
    ],
)
def test_a_recipe_that_says_what_nothing_reads(capsys, here, tmp_path, recipe, flags, message):
    """A flag goes before the recipe, and what it makes idle in there is no mistake."""
    path = tmp_path / "mine.toml"
    path.write_text(recipe)
    arguments = ("convert", here / "dense", "--recipe", path, "--expert-size", "8", "--dry-run", *flags)
    status, out, err = call(capsys, *arguments)
    if message is None:
        assert (status, err) == (0, "")
    else:
        assert_one_line(status, err, "convert", ": error: " + message.format(path))
        assert out == ""


def test_init_beside_another_method_in_python(here):
    model = AutoModelForCausalLM.from_pretrained(here / "dense")
    with pytest.raises(ValueError, match=r'init is \'noise\'; allowed: together with method="dot"'):
        dk.convert(model, dk.DotMoeConfig(num_experts=8, top_k=2), method="random", init="noise")


@pytest.mark.parametrize("data", [{"input_ids": [[1, 2]]}, [{"input_ids": [1, 2]}], "held.txt"])
def test_data_that_is_no_token_ids(here, data):
    message = r"data is (a|of rows such as a) (dict|str); allowed: token ids: a tensor \[N, S\] int64"
    with pytest.raises(ValueError, match=message):
        dk.convert(AutoModelForCausalLM.from_pretrained(here / "dense"), dk.DotMoeConfig(num_experts=8, top_k=2), data=data)
    from dotmoe_kernels.conversion import finetune

    with pytest.raises(ValueError, match=message):
        finetune(dk.load(here / "moe"), data)
    with pytest.raises(ValueError, match=message.replace("data is", "held_out is")):
        finetune(dk.load(here / "moe"), torch.ones(2, 4, dtype=torch.long), held_out=data)


# --- recipes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x = " + b"[" * 5000, r"recipe .*mine.toml is no TOML file \(.*recursion"),
        (b"\xff\xfe", r"recipe .*mine.toml is no TOML file \("),
        (b"x = '", r"recipe .*mine.toml is no TOML file \("),
    ],
)
def test_a_recipe_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(str(path))


def test_a_recipe_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path / "mine.toml"
    path.write_text("")
    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"recipe is .*mine.toml, which cannot be read \(Permission denied\)"):
        load_recipe(str(path))


def test_recipes_with_a_byte_order_mark_and_of_nobody(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('dtype = "float32"', encoding="utf-8-sig")
    assert load_recipe(str(path)).dtype == "float32"
    with pytest.raises(ValueError, match="which is no file"):
        load_recipe("~nobody-of-that-name/x.toml")


@pytest.mark.parametrize("command", ["convert", "eval", "generate", "info"])
def test_a_home_that_nobody_has(capsys, here, tmp_path, command):
    extra = {"eval": ("--data", here / "held.txt"), "generate": ("--prompt", "the"), "info": ()}
    extra["convert"] = convert_arguments(here, tmp_path / "moe")[2:]
    status, out, err = call(capsys, command, "~nobody-of-that-name/model", *extra[command])
    assert_one_line(status, err, command, "~nobody-of-that-name/model")
    assert out == ""
