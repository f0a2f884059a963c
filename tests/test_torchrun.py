"""`dotmoe convert` under torchrun: the same flags, one voice, and a run that one process ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_cli import call, convert_arguments
from test_cli import here as here
from test_cli import tokenizer as tokenizer

import dotmoe_kernels as dk
from dotmoe_kernels import cli

FLAGS = ("--steps", "6", "--batch-size", "4", "--micro-batch-size", "1", "--checkpoint-every", "2")
SIGNALLED = """
import os, signal, sys
import torch.distributed as dist
from dotmoe_kernels.alignment import loop
from dotmoe_kernels.cli import main

real = loop.shuffled_rows

def rows(data, step, *rest):
    if step == 4 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGNAL)
    return real(data, step, *rest)

loop.shuffled_rows = rows
sys.exit(main())
"""


def torchrun(*command, count=2):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run([*launch, *map(str, command)], capture_output=True, text=True, check=False, timeout=300)


def perplexity(out):
    return float(re.search(r"sparse ([\d.]+) \(", out)[1])


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_processes_killed_in_the_middle_then_one(capsys, here, tmp_path):
    (tmp_path / "killed.py").write_text(SIGNALLED.replace("SIGNAL", "SIGKILL"))
    begin = time.monotonic()
    done = torchrun(tmp_path / "killed.py", *convert_arguments(here, tmp_path / "moe", *FLAGS))
    assert done.returncode != 0
    assert time.monotonic() - begin < 60 + 240  # the start of three interpreters on a busy machine, then 60 s
    assert re.search(r"rank\s+: 1 \(local_rank: 1\)", done.stderr), done.stderr
    assert not (tmp_path / "moe").exists()
    assert [path.name for path in (tmp_path / "moe.run" / "checkpoints").glob("step-*4")] == ["step-0000004"]
    assert all(0 <= entry["communication"] <= 1 and entry["tokens_per_second"] > 0 for entry in entries(tmp_path / "moe.run"))
    status, out, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *FLAGS, "--resume"))
    assert (status, err) == (0, "")
    status, whole, _ = call(capsys, *convert_arguments(here, tmp_path / "whole", *FLAGS))
    assert status == 0
    assert perplexity(out) == pytest.approx(perplexity(whole), rel=1e-4)
    log, expected = entries(tmp_path / "moe.run"), entries(tmp_path / "whole.run")
    assert [entry["step"] for entry in log] == list(range(1, 7))
    assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)
    assert not (tmp_path / "moe.run" / "checkpoints").exists()


def test_one_rank_that_is_asked_to_stop_stops_all(here, tmp_path):
    (tmp_path / "stopped.py").write_text(SIGNALLED.replace("SIGNAL", "SIGTERM"))
    done = torchrun(tmp_path / "stopped.py", *convert_arguments(here, tmp_path / "moe", *FLAGS))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("dotmoe convert")]
    left = tmp_path / "moe.run" / "checkpoints" / "step-0000005"
    words = f"align stopped after step 5 of 6, as asked; checkpoint {left}; the same command with --resume continues it"
    assert said == [f"dotmoe convert: {words}"]
    assert left.is_dir()
    assert not (tmp_path / "moe").exists()


def test_one_voice(here, tmp_path):
    command = ("-m", "dotmoe_kernels", *convert_arguments(here, tmp_path / "moe", *FLAGS[:-2], "--stage", "reconstruct,align"))
    done = torchrun(*command, "--reconstruct-steps", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len([line for line in lines if line.startswith("data: ")]) == 1
    assert len([line for line in lines if line.startswith("saved: ")]) == 1
    assert (tmp_path / "moe" / "config.json").is_file()
    assert len(entries(tmp_path / "moe.run")) == 6


def test_a_refusal_is_said_once(here, tmp_path):
    command = ("-m", "dotmoe_kernels", *convert_arguments(here, tmp_path / "moe", *FLAGS))
    refused = torchrun(*command, "--micro-batch-size", "4")
    said = [line for line in refused.stderr.splitlines() if line.startswith("dotmoe convert")]
    assert said == ["dotmoe convert: error: --micro-batch-size is 4; allowed: at most 3: a pass for each of the 2 ranks"]
    assert refused.returncode != 0


def test_sharded_weights_give_the_same_model(capsys, here, tmp_path):
    stages = ("--stage", "reconstruct,align,finetune", "--reconstruct-steps", "2", "--finetune-steps", "2")
    command = ("-m", "dotmoe_kernels", *convert_arguments(here, tmp_path / "moe", *FLAGS, *stages))
    done = torchrun(*command, "--shard", "--activation-checkpointing")
    assert done.returncode == 0, done.stderr
    status, out, _ = call(capsys, *convert_arguments(here, tmp_path / "whole", *FLAGS, *stages))
    assert status == 0
    for name in ("dense", "sparse"):
        found, expected = (re.search(rf"{name} ([\d.]+)", text)[1] for text in (done.stdout, out))
        assert float(found) == pytest.approx(float(expected), rel=1e-4)
    for part in ("", "finetune"):
        log, expected = entries(tmp_path / "moe.run" / part), entries(tmp_path / "whole.run" / part)
        assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in expected], rel=1e-5)
    assert sorted(path.name for path in (tmp_path / "moe.run").iterdir()) == ["finetune", "log.jsonl"]
    ours, theirs = (dk.load(tmp_path / name).state_dict() for name in ("moe", "whole"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shard",), "--shard is given; allowed: under torchrun, whose processes share the weights"),
        (("--gpus", "8"), "--gpus is 8; allowed: together with --dry-run; a run gets its GPUs from torchrun --nproc-per-node"),
        (("--gpus", "65", "--dry-run"), "--gpus is 65; allowed: 1 to 64"),
        (("--gpus", "0", "--dry-run"), "--gpus is 0; allowed: 1 to 64"),
    ],
)
def test_refused(capsys, here, tmp_path, flags, message):
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *flags))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"dotmoe convert: error: {message}")
    assert not (tmp_path / "moe").exists()


def test_an_error_in_the_arguments_is_said_once(here, tmp_path):
    wrong = ("-m", "dotmoe_kernels", *convert_arguments(here, tmp_path / "moe", "--steps", "many"))
    done = torchrun(*wrong)
    said = [line for line in done.stderr.splitlines() if line.startswith("dotmoe convert")]
    assert said == ["dotmoe convert: error: argument --steps: invalid int value: 'many'"]
    assert done.returncode != 0


@pytest.fixture
def second_rank(monkeypatch):
    """This process as torchrun's second; what it waits for is that torchrun ends it, the first having failed."""
    monkeypatch.setattr(cli, "process_rank", lambda: 1)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("arguments", "status"), [(("convert", "--steps", "many"), 2), (("convert", "--help"), 0)])
def test_another_rank_is_silent_and_ends_alike(capsys, second_rank, arguments, status):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == status
    assert capsys.readouterr() == ("", "")
