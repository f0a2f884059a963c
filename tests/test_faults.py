"""A run that is asked to stop, killed, out of room, or whose checkpoint is torn: what is left is whole, and goes on bit for bit."""

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_alignment import assert_equal, config, interrupt_at, lines, run, state, toy
from test_alignment import interrupted as interrupted  # a fixture: 3 of 6 steps done
from test_cli import call, contents, convert_arguments
from test_cli import here as here
from test_cli import tokenizer as tokenizer
from test_stages import DATA, options, prepared

import dotmoe_kernels as dk
from dotmoe_kernels.alignment import loop, reconstruction
from dotmoe_kernels.alignment.checkpoints import BrokenCheckpoint, newest_checkpoint, save_checkpoint
from dotmoe_kernels.alignment.reconstruction import reconstruct
from dotmoe_kernels.alignment.stopping import Stop, Stopped
from dotmoe_kernels.conversion import finetuning

HINT = "; the same command with --resume continues it\n"
STEPS = ("--steps", "6", "--reconstruct-steps", "4", "--finetune-steps", "5", "--stage", "reconstruct,align,finetune")


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    """The model of a run that nothing disturbs."""
    from dotmoe_kernels import cli

    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(convert_arguments(here, folder / "moe", *STEPS)) == 0
    return folder / "moe"


def assert_same_model(a, b):
    x, y = contents(a), contents(b)
    assert x.keys() == y.keys()
    assert {name for name in x if x[name] != y[name]} <= {"README.md"}  # the card has the folder's name
    dk.load(a)


# --- SIGTERM --------------------------------------------------------------------------------------------------------------


def send_at(monkeypatch, module, nth, number=signal.SIGTERM):
    """The signal in the middle of the nth step of a stage, between the choice of its batch and its end."""
    real, count = module.shuffled_rows, iter(range(1, 10_000))

    def rows(*args):
        if next(count) == nth:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a launcher passes on what its children have got already
        return real(*args)

    monkeypatch.setattr(module, "shuffled_rows", rows)


@pytest.fixture
def ctrl_c():
    """SIGINT as a terminal's programs have it: a job in the background begins with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("module", "nth", "words", "left"),
    [
        # layers of 4 steps each: the second of them is in its second step
        (reconstruction, 6, "reconstruct of layer model.layers.1.mlp stopped after step 2 of 4", "reconstruct/layer-0001"),
        (reconstruction, 4, "reconstruct of layer model.layers.0.mlp stopped after step 4 of 4", "reconstruct/layer-0000"),
        (loop, 3, "align stopped after step 3 of 6", "checkpoints"),
        (loop, 6, "align stopped after step 6 of 6", "checkpoints"),
        (finetuning, 2, "finetune stopped after step 2 of 5", "finetune/checkpoints"),
    ],
    ids=["reconstruct", "reconstruct, last step of a layer", "align", "align, last step", "finetune"],
)
def test_sigterm_finishes_the_step_and_the_run_goes_on(capsys, here, whole, tmp_path, monkeypatch, module, nth, words, left):
    output, folder = tmp_path / "moe", tmp_path / "moe.run"
    left = folder / left / f"step-{int(words.split()[-3]):07d}.pt"
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        send_at(patch, module, nth)
        status, _, err = call(capsys, *convert_arguments(here, output, *STEPS))
    assert status == 0
    assert err == f"dotmoe convert: {words}, as asked; checkpoint {left}{HINT}"
    assert not output.exists()
    assert left.is_file()
    assert signal.getsignal(signal.SIGTERM) == before
    assert call(capsys, *convert_arguments(here, output, *STEPS), "--resume")[0::2] == (0, "")
    assert_same_model(output, whole)


def test_sigterm_beside_a_training_ends_it_at_once(capsys, here, tmp_path, monkeypatch):
    from dotmoe_kernels import evaluation

    def perplexity(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(evaluation, "perplexity", perplexity)
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe"))
    assert (status, err) == (0, f"dotmoe convert: stopped before the next step{HINT}")
    assert not (tmp_path / "moe").exists()


def test_ctrl_c_interrupts_as_ever(ctrl_c, capsys, here, tmp_path, monkeypatch):
    send_at(monkeypatch, loop, 3, signal.SIGINT)
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe"))
    assert (status, err) == (130, f"dotmoe convert: interrupted{HINT}")


def test_a_stop_without_a_folder_keeps_nothing():
    stop = Stop()
    with pytest.raises(Stopped, match="align stopped after step 2 of 4, as asked; nothing is kept, there being no folder"):
        run(*toy(), config(), on_step=lambda done: setattr(stop, "asked", done == 1), stop=stop)


def test_a_stop_after_the_last_look_is_not_forgotten():
    stop = Stop()
    with pytest.raises(Stopped, match="between two stages"):
        run(*toy(), config(), on_step=lambda done: setattr(stop, "asked", done == 4), stop=stop)


@pytest.mark.parametrize("router", ["top_k", "soft"])
@pytest.mark.parametrize("fields", [{}, {"refresh_every": 3, "tol": 1e-3}, {"centre": True}], ids=str)
def test_a_layer_goes_on_in_its_middle_bit_for_bit(tmp_path, monkeypatch, router, fields):
    """The optimizer, the warm start of the transport and the assignment that is not rounded anew."""
    few = options(steps=8, **fields)
    model, layers = prepared(router=router)
    wanted = reconstruct(model, layers, DATA, few, progress=False)
    expected = state(layers)
    stop, (model, layers) = Stop(), prepared(router=router)
    with monkeypatch.context() as patch:
        count, real = iter(range(100)), reconstruction.shuffled_rows
        patch.setattr(reconstruction, "shuffled_rows", lambda *args: (setattr(stop, "asked", next(count) == 12), real(*args))[1])
        with pytest.raises(Stopped, match="stopped after step 5 of 8"):
            reconstruct(model, layers, DATA, few, folder=tmp_path, progress=False, stop=stop)
    model, layers = prepared(router=router)
    found = reconstruct(model, layers, DATA, few, folder=tmp_path, progress=False, resume=True)
    assert found.errors == wanted.errors
    assert_equal(state(layers), expected)


# --- a torn checkpoint ----------------------------------------------------------------------------------------------------

DAMAGES = ("cut off", "a bit in the middle", "a page of zeros", "empty", "of another kind")


def damage(path, kind):
    whole = bytearray(path.read_bytes())
    at = whole.find(bytes(whole[len(whole) // 2 : len(whole) // 2 + 8]))
    if kind == "cut off":
        del whole[len(whole) // 2 :]
    elif kind == "a bit in the middle":  # of a tensor: torch.load reads it without a word
        whole[at] ^= 1
    elif kind == "a page of zeros":  # as a file system leaves what it had not written yet
        whole[at : at + 512] = bytes(512)
    path.write_bytes({"empty": b"", "of another kind": b"text\n" * 50}.get(kind, bytes(whole)))


@pytest.fixture
def five_of_six(tmp_path):
    """Checkpoints after 2 and 4 steps, and the log of 5."""
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(*toy(), config(steps=6, checkpoint_every=2), folder=folder, on_step=interrupt_at(5, KeyboardInterrupt))
    return folder


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_one_before_a_torn_checkpoint_is_used(tmp_path, five_of_six, kind):
    torn = five_of_six / "checkpoints" / "step-0000004.pt"
    damage(torn, kind)
    model, layers = toy()
    run(model, layers, config(steps=6, checkpoint_every=2), folder=tmp_path / "whole")
    expected = state(layers)
    model, layers = toy()
    with pytest.warns(UserWarning, match=r"step-0000004\.pt cannot be read: .*; .*step-0000002\.pt, the one before it"):
        result = run(model, layers, config(steps=6, checkpoint_every=2), folder=five_of_six, resume=True)
    assert [row["step"] for row in result.log] == [3, 4, 5, 6]
    assert_equal(state(layers), expected)
    assert lines(five_of_six) == lines(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the torn one has been written again
        assert newest_checkpoint(five_of_six / "checkpoints")[0].name == "step-0000006.pt"
    assert sorted(p.name for p in (five_of_six / "checkpoints").iterdir()) == ["step-0000004.pt", "step-0000006.pt"]


def test_no_whole_checkpoint_is_refused(five_of_six):
    for path in (five_of_six / "checkpoints").iterdir():
        damage(path, "a bit in the middle")
    with pytest.raises(BrokenCheckpoint, match=r"step-0000004\.pt cannot be read: .*step-0000002\.pt cannot be read"):
        run(*toy(), config(steps=6, checkpoint_every=2), folder=five_of_six, resume=True)


def test_a_torn_checkpoint_on_the_command_line(ctrl_c, capsys, here, tmp_path, monkeypatch):
    """stderr says which was used, and why."""
    arguments = convert_arguments(here, tmp_path / "moe", "--steps", "6", "--checkpoint-every", "2")
    with monkeypatch.context() as patch:
        send_at(patch, loop, 5, signal.SIGINT)
        assert call(capsys, *arguments)[0] == 130
    checkpoints = tmp_path / "moe.run" / "checkpoints"
    damage(checkpoints / "step-0000004.pt", "a bit in the middle")
    status, _, err = call(capsys, *arguments, "--resume")
    assert status == 0
    assert err.startswith(f"dotmoe convert: warning: checkpoint {checkpoints / 'step-0000004.pt'} cannot be read: its part ")
    assert err.endswith(f"is not what was written; {checkpoints / 'step-0000002.pt'}, the one before it, is used\n")
    assert err.count("\n") == 1


def test_a_layer_of_a_torn_checkpoint_is_trained_anew(tmp_path):
    few = options(steps=4)
    model, layers = prepared()
    reconstruct(model, layers, DATA, few, folder=tmp_path, progress=False)
    expected = state(layers)
    damage(tmp_path / "layer-0001" / "step-0000004.pt", "a bit in the middle")
    model, layers = prepared()
    with pytest.warns(UserWarning, match=r"layer-0001.step-0000004\.pt cannot be read: .*; the layer is trained anew"):
        reconstruct(model, layers, DATA, few, folder=tmp_path, progress=False, resume=True)
    assert_equal(state(layers), expected)


# --- a full disk ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint_whole(capsys, here, tmp_path, monkeypatch):
    """No file may grow any more once the first checkpoint is there."""
    import resource

    arguments = convert_arguments(here, tmp_path / "moe", "--steps", "6", "--checkpoint-every", "2")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real, count = loop.shuffled_rows, iter(range(1, 100))

    def rows(*args):
        if next(count) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
        return real(*args)

    checkpoints = tmp_path / "moe.run" / "checkpoints"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "shuffled_rows", rows)
        try:
            status, _, err = call(capsys, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert err == (
        f"dotmoe convert: error: [Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: no checkpoint after step 4; the last one is "
        f"{checkpoints / 'step-0000002.pt'}, which is whole; with more room {HINT[2:]}"
    )
    assert [p.name for p in checkpoints.iterdir()] == ["step-0000002.pt"]  # nothing half-written, hidden or not
    assert newest_checkpoint(checkpoints)[1]["step"] == 2
    assert call(capsys, *arguments, "--resume")[0::2] == (0, "")
    assert call(capsys, *convert_arguments(here, tmp_path / "whole", "--steps", "6", "--checkpoint-every", "2"))[0] == 0
    assert_same_model(tmp_path / "moe", tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """300 kB; skipped where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_without_room(small_disk):
    """ENOSPC itself: the checkpoint before is whole, and nothing lies about."""
    tensor = torch.arange(25_000)  # 200 kB
    first = save_checkpoint(small_disk, 1, {"tensor": tensor, "fingerprint": {}})
    before = contents(small_disk)
    with pytest.raises(OSError, match=rf"no checkpoint after step 2; the last one is {first}, which is whole") as raised:
        save_checkpoint(small_disk, 2, {"tensor": tensor, "fingerprint": {}})
    assert raised.value.errno == errno.ENOSPC
    assert contents(small_disk) == before
    assert torch.equal(newest_checkpoint(small_disk)[1]["tensor"], tensor)


# --- kill -9 --------------------------------------------------------------------------------------------------------------


def test_kills_leave_nothing_that_is_wrong(tmp_path):
    """At three random moments; `python -m bench.soak` kills thirty times, and says how."""
    command = [sys.executable, "-m", "bench.soak", "--kills", "3", "--seed", "0", "--out", str(tmp_path / "soak.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert (result["kills"], result["wrong"]) == (3, [])
