"""Where a command writes: nothing of the user's goes, and what cannot be written is said before anything is trained."""

import errno
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_cli
import torch
from test_cli import assert_one_line, call, contents, convert_arguments, interrupt, prose

import dotmoe_kernels as dk
from dotmoe_kernels._files import probe_folder, write_folder
from dotmoe_kernels.alignment import checkpoints
from dotmoe_kernels.conversion.demo import run_demo

here, converted, tokenizer, tiny_demo = test_cli.here, test_cli.converted, test_cli.tokenizer, test_cli.tiny_demo


@pytest.fixture
def untrained(monkeypatch):
    """Loading a model is an error: what is refused is refused before."""

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("dotmoe_kernels.conversion.sources.read_dense", loaded)


@pytest.fixture
def work(here, converted, tmp_path, monkeypatch):
    """A folder with a model, and with what somebody else keeps there; the current folder is beside it."""
    shutil.copytree(converted, tmp_path / "work")
    shutil.copy(here / "text.txt", tmp_path / "work" / "corpus.txt")
    for name in (".git/HEAD", "checkpoint-500/model.safetensors", "data/a.txt"):
        (tmp_path / "work" / name).parent.mkdir()
        (tmp_path / "work" / name).write_text("mine")
    (tmp_path / "link").symlink_to("work")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "work"


# --- what an output may hold ------------------------------------------------------------------------------------------------


FORMS = ["{}/work", "../work", "../work/", "../here/../work", "../link", "../link/.", "~/work"]


@pytest.mark.parametrize("output", FORMS)
@pytest.mark.parametrize(
    "source", ["{}/work/corpus.txt", "../work/corpus.txt", "../link/corpus.txt", "~/work/corpus.txt", "../work", "../work/data/"]
)
def test_data_in_the_output_is_refused_before_training(capsys, here, work, untrained, output, source):
    arguments = convert_arguments(here, output.format(work.parent), "--overwrite")
    arguments[3] = source.format(work.parent)
    before = contents(work)
    status, out, err = call(capsys, *arguments)
    assert_one_line(status, err, "convert", f"which holds {arguments[3]} of --data; allowed: another folder")
    assert out == ""
    assert contents(work) == before


@pytest.mark.parametrize("output", FORMS)
@pytest.mark.parametrize("kind", ["MODEL", "the current folder"])
def test_the_model_and_the_current_folder_in_the_output_are_refused(capsys, here, work, untrained, monkeypatch, kind, output):
    shutil.copytree(here / "dense", work / "dense")
    model = here / "dense"
    output = output.format(work.parent)
    if kind == "MODEL":
        model = {"~": "~/work/dense", ".": "../link/dense"}.get(output[0], work / "dense")
    else:
        (work / "here").mkdir()
        monkeypatch.chdir(work / "here")
        output = output.replace("../", "../../", 1)
    before = contents(work)
    arguments = convert_arguments(here, output, "--overwrite")
    arguments[1] = str(model)
    status, _, err = call(capsys, *arguments)
    assert_one_line(status, err, "convert", f"which holds {kind}; allowed: another folder")
    assert contents(work) == before


def test_what_is_no_part_of_a_model_stays(capsys, here, work):
    kept = {name: hashed for name, hashed in contents(work).items() if "/" in name or name == "corpus.txt"}
    old = contents(work)["model.safetensors"]
    assert len(kept) == 4
    assert call(capsys, *convert_arguments(here, "../link", "--overwrite", "--seed", "3"))[0] == 0
    after = contents(work)
    assert {name: after.get(name) for name in kept} == kept
    assert after["model.safetensors"] != old
    assert dk.load(work).config.assignment["seed"] == 3
    assert not list(work.glob(".dotmoe-*"))
    assert sorted(p.name for p in work.parent.iterdir()) == ["here", "link", "link.run", "work"]


def test_an_empty_folder_is_taken(capsys, here, tmp_path, monkeypatch):
    (tmp_path / "moe").mkdir()
    monkeypatch.chdir(tmp_path / "moe")
    inode = (tmp_path / "moe").stat().st_ino
    assert call(capsys, *convert_arguments(here, "."))[0] == 0
    assert (tmp_path / "moe").stat().st_ino == inode
    assert dk.load(tmp_path / "moe").config.num_experts == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe", "moe.run"]


def test_a_name_of_230_letters(capsys, here, tmp_path):
    output = tmp_path / ("m" * 230)
    assert call(capsys, *convert_arguments(here, output))[0] == 0
    assert call(capsys, *convert_arguments(here, output, "--overwrite"))[0] == 0
    assert dk.load(output).config.num_experts == 8


@pytest.mark.parametrize(("letters", "words"), [(253, "and {}.run cannot be written to"), (256, "which cannot be written to")])
def test_a_name_that_is_too_long_is_said_before_training(capsys, here, tmp_path, untrained, letters, words):
    output = tmp_path / ("m" * letters)
    status, _, err = call(capsys, *convert_arguments(here, output))
    assert_one_line(status, err, "convert", words.format(output) + " ([Errno 36] File name too long")
    assert list(tmp_path.iterdir()) == []


# --- the folder of the run --------------------------------------------------------------------------------------------------


def test_the_folder_of_the_run_may_be_elsewhere(capsys, here, tmp_path, monkeypatch):
    options = ("--steps", "4", "--checkpoint-every", "2", "--run-folder", tmp_path / "scratch" / "run")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert call(capsys, *convert_arguments(here, tmp_path / "moe", *options))[0] == 130
    kept = [name for name in sorted(contents(tmp_path)) if not name.startswith("scratch/run/tokens/")]
    assert kept == ["scratch/run/checkpoints/step-0000002.pt", "scratch/run/log.jsonl"]
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", *options))
    assert_one_line(status, err, "convert", f"with an interrupted run in {tmp_path / 'scratch' / 'run'}; allowed: --resume")
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "another", *options, "--resume"))
    assert (status, err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["another", "scratch"]
    assert list(contents(tmp_path / "scratch")) == ["run/log.jsonl"]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("{}/moe", "--run-folder is {}/moe, which is not apart from {}/moe of --output; allowed: another folder"),
        ("{}/moe/run", "--run-folder is {}/moe/run, which is not apart from"),
        ("{}", "--run-folder is {}, which holds something else than a run; allowed: a new folder, or one of a run"),
        ("{}/notes.txt", "--run-folder is {}/notes.txt, which holds something else than a run"),
        ("{}/notes.txt/run", "--run-folder is {}/notes.txt/run, which cannot be written to ("),
    ],
)
def test_a_folder_of_the_run_that_does_not_do(capsys, here, tmp_path, untrained, run, message):
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", "--run-folder", run.format(tmp_path)))
    assert_one_line(status, err, "convert", message.format(tmp_path, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_data_in_the_folder_of_the_run_is_refused(capsys, here, tmp_path, untrained):
    (tmp_path / "moe.run" / "finetune").mkdir(parents=True)
    shutil.copy(here / "text.txt", tmp_path / "moe.run" / "finetune" / "corpus.txt")
    arguments = convert_arguments(here, tmp_path / "moe", "--overwrite")
    arguments[3] = str(tmp_path / "moe.run" / "finetune" / "corpus.txt")
    status, _, err = call(capsys, *arguments)
    assert_one_line(status, err, "convert", f"and {tmp_path / 'moe.run'} holds {arguments[3]} of --data; allowed: another folder")


@pytest.mark.parametrize("extra", [(), ("--overwrite",), ("--overwrite", "--stage", "reconstruct")], ids=" ".join)
def test_a_run_clears_what_runs_write_and_nothing_else(capsys, here, tmp_path, extra):
    run = tmp_path / "moe.run"
    theirs = (".git/HEAD", "checkpoints/notes.txt", "finetune/mine/a.txt", "reconstruct/layer-0000/b.txt")
    ours = ("reconstruct/layer-0001/step-0000009.pt", "finetune/checkpoints/.step-0000001.pt.x", "finetune/log.jsonl")
    for name in (*theirs, *(ours if extra else ours[1:2])):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    options = ("--reconstruct-steps", "1") if "reconstruct" in extra else ()
    arguments = convert_arguments(here, tmp_path / "moe", *extra, *options)
    if options:
        del arguments[arguments.index("--steps") : arguments.index("--steps") + 2]
    assert call(capsys, *arguments)[0] == 0
    assert sorted(contents(run)) == sorted([*theirs, *(() if options else ("log.jsonl",))])


def test_reconstruction_alone_leaves_no_folder_of_a_run(capsys, here, tmp_path):
    arguments = convert_arguments(here, tmp_path / "moe", "--stage", "reconstruct", "--reconstruct-steps", "1")
    del arguments[arguments.index("--steps") : arguments.index("--steps") + 2]
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    assert [p.name for p in tmp_path.iterdir()] == ["moe"]


@pytest.mark.parametrize("stage", ["align", "reconstruct", "finetune"])
def test_resuming_nothing_is_said(capsys, here, converted, tmp_path, stage):
    arguments = convert_arguments(here, tmp_path / "out", "--resume", "--stage", stage)
    steps = arguments.index("--steps")
    if stage == "finetune":
        arguments[1] = str(converted)
        del arguments[arguments.index("--expert-size") : arguments.index("--expert-size") + 2]
        steps = arguments.index("--steps")
    if stage != "align":
        arguments[steps : steps + 2] = [f"--{stage}-steps", "1"]
        place = tmp_path / "out.run" / "checkpoints"  # of another stage: nothing that this one could resume
        place.mkdir(parents=True)
        (place / "step-0000001.pt").write_bytes(b"")
    status, _, err = call(capsys, *arguments)
    assert status == 0, err
    assert err == f"dotmoe convert: --resume: nothing to resume in {tmp_path / 'out.run'}, the run starts anew\n"


# --- file systems -----------------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder, *arguments):
    """A mount on ``folder``; skips the test without the right to make one."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def mountable():
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("mounting takes root and mount")


@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_a_mount_point_is_written_into(capsys, here, converted, tmp_path, mountable, kind):
    (tmp_path / "real").mkdir()
    with mounted(tmp_path / "out", *(("--bind", str(tmp_path / "real")) if kind == "bind" else ("-t", "tmpfs", "tmpfs"))) as output:
        assert call(capsys, *convert_arguments(here, output))[0] == 0
        (output / "mine.txt").write_text("mine")
        assert call(capsys, *convert_arguments(here, output, "--overwrite", "--seed", "2"))[0] == 0
        assert dk.load(output).config.assignment["seed"] == 2
        assert (output / "mine.txt").read_text() == "mine"
        assert not list(output.glob(".*"))
        dk.export(converted, output, overwrite=True)
        assert json.loads((output / "config.json").read_text())["model_type"] == "llama"


def test_a_folder_beside_which_nothing_can_be_written(capsys, here, tmp_path, untrained, mountable):
    """As a container's root that is read-only, with a volume in it: the run goes elsewhere."""
    (tmp_path / "root" / "volume").mkdir(parents=True)
    with mounted(tmp_path / "root", "--bind", str(tmp_path / "root")):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "root")], check=True)
        output = tmp_path / "root" / "volume"
        with mounted(output, "-t", "tmpfs", "tmpfs"):
            status, _, err = call(capsys, *convert_arguments(here, output))
            message = f"--output is {output}, and {output}.run cannot be written to ([Errno 30] Read-only file system"
            assert_one_line(status, err, "convert", message)
            assert "allowed: a folder that can be made, or another --run-folder" in err
            assert list(output.iterdir()) == []
            status, _, err = call(capsys, *convert_arguments(here, output, "--run-folder", tmp_path / "run"))
            assert_one_line(status, err, "convert", "cannot be read (AssertionError: the model was loaded)")
        status, _, err = call(capsys, *convert_arguments(here, tmp_path / "root" / "new"))
        assert_one_line(status, err, "convert", "new, which cannot be written to ([Errno 30] Read-only file system")


@pytest.fixture
def without_folder_renames(monkeypatch):
    """As on an object store: files are renamed, folders are not."""
    real, refused = Path.rename, []

    def rename(self, target):
        if self.is_dir():
            refused.append(self)
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    return refused


def test_a_file_system_that_renames_no_folders(capsys, here, tmp_path, without_folder_renames):
    assert call(capsys, *convert_arguments(here, tmp_path / "a" / "moe"))[0] == 0
    assert len(without_folder_renames) == 2  # the probe and the save
    assert dk.load(tmp_path / "a" / "moe").config.num_experts == 8
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["moe", "moe.run"]
    assert not list((tmp_path / "a" / "moe").glob(".*"))


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EROFS])
@pytest.mark.parametrize("exists", [True, False])
def test_a_file_system_that_renames_nothing_is_found_before_training(
    capsys,
    here,
    converted,
    tmp_path,
    untrained,
    monkeypatch,
    number,
    exists,
):
    def rename(self, target):
        raise OSError(number, os.strerror(number), str(self))

    if exists:
        shutil.copytree(converted, tmp_path / "moe")
    before = contents(tmp_path)
    monkeypatch.setattr(Path, "rename", rename)
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "moe", "--overwrite"))
    assert_one_line(status, err, "convert", f"--output is {tmp_path / 'moe'}, which cannot be written to ([Errno {number}]")
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == exists


def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch):
    """Some network file systems sync files alone."""
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    probe_folder(tmp_path / "new")
    with write_folder(tmp_path / "new") as new:
        (new / "config.json").write_text("{}")
    assert contents(tmp_path).keys() == {"new/config.json"}


@pytest.mark.parametrize("file", [True, False])
def test_a_probe_leaves_nothing(tmp_path, file):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").write_text("mine")
    for name in ("old", "new", "a/b/c"):
        probe_folder(tmp_path / name, file=file)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["old", "old/mine.txt"]
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        probe_folder(tmp_path / "old" / "mine.txt" / "x" / "y", file=file)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["old", "old/mine.txt"]


OLD = {"config.json": "old", "model.safetensors": "old", "model-00002-of-00002.safetensors": "old", "mine.txt": "mine"}
NEW = {"config.json": "new", "model-00001-of-00001.safetensors": "new", "templates/a.jinja": "new"}
AFTER = {**NEW, "mine.txt": "mine"}


def written(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def exchange(folder):
    with write_folder(folder, lambda name: name.startswith("model") or name == "config.json") as new:
        for name, text in NEW.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "busy"), KeyboardInterrupt()], ids=["error", "interrupted"])
def test_a_failure_at_any_step_puts_everything_back(tmp_path, monkeypatch, error):
    real, failed = Path.rename, 0
    for at in range(20):
        folder, count = tmp_path / str(at), iter(range(100))
        folder.mkdir()
        for name, text in OLD.items():
            (folder / name).write_text(text)

        def rename(self, target, at=at, count=count):
            if next(count) == at:
                if isinstance(error, KeyboardInterrupt):  # after the fact
                    real(self, target)
                raise error
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            try:
                exchange(folder)
            except (OSError, KeyboardInterrupt):
                failed += 1
                assert written(folder) == OLD, at
                assert sorted(p.name for p in folder.iterdir()) == sorted(OLD)
                continue
        assert written(folder) == AFTER
        assert sorted(p.name for p in folder.iterdir()) == [
            "config.json",
            "mine.txt",
            "model-00001-of-00001.safetensors",
            "templates",
        ]
        break
    assert failed == 6  # three files away, three in


def test_a_kill_at_any_step_leaves_one_model_or_none(tmp_path, monkeypatch):
    """No folder has a config.json beside another model's files, and nothing is lost."""
    real, seen = Path.rename, set()
    for at in range(20):
        folder, count = tmp_path / str(at), iter(range(100))
        folder.mkdir()
        for name, text in OLD.items():
            (folder / name).write_text(text)

        def rename(self, target, at=at, count=count):
            if next(count) == at:
                os._exit(9)
            return real(self, target)

        child = os.fork()
        if child == 0:
            Path.rename = rename
            exchange(folder)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen_there = {name: text for name, text in written(folder).items() if not name.startswith(".dotmoe-")}
        if "config.json" in seen_there:
            assert seen_there in (OLD, AFTER)
        everything = written(folder)
        if status:
            assert sum(text == "old" for text in everything.values()) == 3
            assert sum(text == "new" for text in everything.values()) == 3
        assert everything["mine.txt"] == "mine"
        seen.add(status)
        if not status:
            break
    assert seen == {0, 9}
    assert at == 6


# --- checkpoints ------------------------------------------------------------------------------------------------------------


def state_of(size):
    return {"fingerprint": {}, "parameters": [torch.randn(size) for _ in range(4)], "step": 1}


def test_a_checkpoint_is_streamed(tmp_path, monkeypatch):
    """Never the whole of it in one write, nor in memory: the largest piece is a tensor's."""
    state, pieces = state_of(50_000), []
    real = checkpoints._Writer.write

    def write(self, data):
        pieces.append(len(data))
        return real(self, data)

    monkeypatch.setattr(checkpoints._Writer, "write", write)
    path = checkpoints.save_checkpoint(tmp_path, 1, state)
    assert max(pieces) <= 4 * 50_000
    found, loaded = checkpoints.resume_from(tmp_path, {})
    assert found == path
    assert all(torch.equal(a, b) for a, b in zip(loaded["parameters"], state["parameters"], strict=True))


@pytest.mark.parametrize("limit", [0, 3_000, 500_000, 800_000])
def test_a_checkpoint_on_a_full_disk_is_an_os_error(tmp_path, limit):
    import resource

    path = checkpoints.save_checkpoint(tmp_path, 1, state_of(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save_checkpoint(tmp_path, 2, state_of(50_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_full_device_is_an_os_error(size):
    def write():
        with open("/dev/full", "wb") as file:
            checkpoints._write_state(state_of(size), file)

    with pytest.raises(OSError, match="No space left on device"):
        write()


def test_a_run_that_starts_anew_drops_the_checkpoints_of_the_abandoned_one(tmp_path):
    for step in (100, 200):
        checkpoints.save_checkpoint(tmp_path, step, state_of(1))
    for step in (3, 6, 9):
        checkpoints.save_checkpoint(tmp_path, step, state_of(1))
        assert checkpoints.last_checkpoint(tmp_path) == checkpoints.checkpoint_path(tmp_path, step)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-0000006.pt", "step-0000009.pt"]


# --- the demo ---------------------------------------------------------------------------------------------------------------


def demo_arguments(folder, data, *extra):
    return ("demo", "--quick", "--data", data, "--output", folder, *extra)


def test_the_demo_keeps_what_it_did_not_write(capsys, tmp_path, tiny_demo):
    (tmp_path / "text.txt").write_text(prose(1200))
    (tmp_path / "demo").mkdir()  # an empty one is taken
    assert call(capsys, *demo_arguments(tmp_path / "demo", tmp_path / "text.txt"))[0] == 0
    theirs = (".git/HEAD", "corpus.txt", "dense/corpus.txt", "dotmoe/checkpoint-5/a.txt", "logs/dot/notes.txt")
    for name in theirs:
        (tmp_path / "demo" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "demo" / name).write_text("mine")
    before = contents(tmp_path / "demo")
    assert call(capsys, *demo_arguments(tmp_path / "demo", tmp_path / "text.txt", "--overwrite", "--seed", "1"))[0] == 0
    after = contents(tmp_path / "demo")
    assert after.keys() == before.keys()
    assert [name for name in theirs if after[name] != before[name]] == []
    assert after["dense/model.safetensors"] != before["dense/model.safetensors"]


@pytest.mark.parametrize("name", ["dense", "dotmoe"])
def test_the_demo_leaves_a_folder_named_like_a_part_of_it_alone(capsys, tmp_path, name):
    (tmp_path / "demo" / name).mkdir(parents=True)
    (tmp_path / "demo" / name / "notes.txt").write_text("mine")
    if name == "dotmoe":
        (tmp_path / "demo" / "demo.json").write_text("{}")
    before = contents(tmp_path)
    status, _, err = call(capsys, "demo", "--quick", "--output", tmp_path / "demo", "--overwrite")
    assert_one_line(status, err, "demo", "which holds something else than a ")
    assert contents(tmp_path) == before


def test_run_demo_asks_before_it_replaces(converted, tmp_path):
    shutil.copytree(converted, tmp_path / "demo" / "dense")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"folder is .*dense, which exists; allowed: a new folder, or overwrite=True"):
        run_demo(tmp_path / "demo", progress=False)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("source", ["logs/text.txt", "dense/text.txt", "dotmoe/text.txt"])
def test_the_demo_never_reads_what_it_writes_over(capsys, here, converted, tmp_path, source):
    folder = tmp_path / "demo"
    for part in ("dense", "dotmoe"):
        shutil.copytree(here / "dense" if part == "dense" else converted, folder / part)
    (folder / "logs").mkdir()
    (folder / source).write_text(prose(1200))
    status, _, err = call(capsys, *demo_arguments(folder, folder / source, "--overwrite"))
    assert_one_line(status, err, "demo", f"holds {folder / source} of --data; allowed: another folder")
