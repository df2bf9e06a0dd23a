"""Checkpoints are whole or not there: kills at every moment, failing writers, full disks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from errors import CheckpointError
from training import atomic
from training.run_dir import open_run_dir

ROOT = Path(__file__).parents[2]
PRELUDE = "import os, sys, time\nfrom training.run_dir import open_run_dir\n"
DYING = """
def die_at(left):
    def dying(name):
        original = getattr(os, name)
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0: os._exit(9)
            return original(*args, **kwargs)
        setattr(os, name, call)
    for name in ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir"): dying(name)
"""


def opened(path, config=None):
    return open_run_dir(path, config or {}, interactive=False)


def python(script: str, *argv: object) -> subprocess.Popen:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def save(text):
    def write(folder):
        (folder / "model.safetensors").write_text(text)

    return write


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_checkpoint_is_the_folder_that_was_written_plus_its_marker(tmp_path):
    run = opened(tmp_path)
    assert run.latest_checkpoint() is None
    folder = run.write_checkpoint(12, save("weights"), final=True)
    assert folder == run.path / "checkpoints" / "step_000012"
    assert (folder / "model.safetensors").read_text() == "weights"
    assert json.loads((folder / "trainer_state/complete.json").read_text()) == {"step": 12, "final": True}
    assert run.latest_checkpoint() == (12, folder)


def test_everything_is_on_the_disk_before_the_marker_and_the_marker_before_the_name(tmp_path, monkeypatch):
    run = opened(tmp_path)
    events = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def recording_rename(self, target):
        events.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    run.write_checkpoint(1, save("weights"))
    order = [name for name in events if name in ("model.safetensors", "complete.json", "renamed", "checkpoints")]
    assert order == ["model.safetensors", "complete.json", "renamed", "checkpoints"]


def test_the_latest_checkpoint_is_by_number_and_only_a_complete_one(tmp_path):
    run = opened(tmp_path)
    for step in (9, 1_000_000, 100):
        run.write_checkpoint(step, save("x"))
    checkpoints = run.checkpoints_path
    (checkpoints / "step_2000000").mkdir()  # no marker
    (checkpoints / "step_000009").rename(checkpoints / "step_3000000")  # the marker of another step
    latest = run.latest_checkpoint()
    assert latest == (1_000_000, checkpoints / "step_1000000")


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    run = opened(tmp_path)
    run.write_checkpoint(1, save("old"))
    run.write_checkpoint(1, save("new"), final=True)
    assert (run.checkpoints_path / "step_000001/model.safetensors").read_text() == "new"
    assert names(run.checkpoints_path) == ["step_000001"]


def test_prune_keeps_the_last_ones(tmp_path):
    run = opened(tmp_path)
    for step in (1, 2, 3, 10):
        run.write_checkpoint(step, save("x"))
    run.prune(0)
    assert len(run.checkpoints()) == 4
    run.prune(2)
    assert names(run.checkpoints_path) == ["step_000003", "step_000010"]
    run.prune(5)
    assert len(run.checkpoints()) == 2
    with pytest.raises(ValueError, match="-1"):
        run.prune(-1)


def test_kill_9_while_a_checkpoint_is_written_leaves_the_previous_one(tmp_path):
    script = """
run = open_run_dir(sys.argv[1], {}, interactive=False)
run.write_checkpoint(1, lambda folder: (folder / "w").write_text("one"))
def write(folder):
    (folder / "w").write_text("half")
    print("writing", flush=True); time.sleep(60)
run.write_checkpoint(2, write)
"""
    child = python(script, tmp_path)
    assert child.stdout and child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert len(names(tmp_path / "checkpoints")) == 2
    run = opened(tmp_path, {})
    assert run.latest_checkpoint() == (1, run.checkpoints_path / "step_000001")
    assert names(run.checkpoints_path) == ["step_000001"]


def test_killed_before_any_disk_operation_of_a_replacement_a_whole_checkpoint_is_there(tmp_path):
    """Dies at the n-th rename, fsync, mkdir, unlink or rmdir, for every n until the write gets through."""
    script = (
        DYING
        + """
run = open_run_dir(sys.argv[1], {}, interactive=False)
run.write_checkpoint(5, lambda folder: (folder / "w").write_text("old"))
die_at(int(sys.argv[2]))
run.write_checkpoint(5, lambda folder: (folder / "w").write_text("new"))
run.prune(1)
os._exit(0)
"""
    )
    seen, code, count = [], 9, 0
    while code == 9:
        path = tmp_path / str(count)
        code = python(script, path, count).wait()
        run = opened(path, {})
        latest = run.latest_checkpoint()
        assert latest and latest[0] == 5 and names(run.checkpoints_path) == ["step_000005"]
        seen.append((latest[1] / "w").read_text())
        count += 1
    assert code == 0 and count > 8
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}  # old until it is new, never back


def test_a_failing_write_leaves_nothing_and_names_path_cause_and_the_last_good_one(tmp_path):
    run = opened(tmp_path)
    run.write_checkpoint(1, save("x"))

    def write(folder):
        (folder / "part").write_text("x")
        raise RuntimeError("no such layer")

    with pytest.raises(CheckpointError) as raised:
        run.write_checkpoint(2, write)
    for part in ("step_000002", "RuntimeError: no such layer", str(run.checkpoints_path / "step_000001")):
        assert part in str(raised.value)
    assert "disk" not in str(raised.value)
    assert names(run.checkpoints_path) == ["step_000001"]


def test_a_failed_replacement_keeps_the_old_checkpoint_and_ctrl_c_stays_ctrl_c(tmp_path, monkeypatch):
    run = opened(tmp_path)
    run.write_checkpoint(1, save("old"))
    rename = Path.rename

    def failing(self, target):
        if self.name.startswith(".tmp-"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt):
        run.write_checkpoint(1, save("new"))
    assert names(run.checkpoints_path) == ["step_000001"]
    assert (run.checkpoints_path / "step_000001/model.safetensors").read_text() == "old"


def test_killed_before_any_disk_operation_of_a_prune_what_counts_as_complete_is_whole(tmp_path):
    script = (
        DYING
        + """
run = open_run_dir(sys.argv[1], {}, interactive=False)
for step in (1, 2, 3): run.write_checkpoint(step, lambda folder: (folder / "a_weight").write_text("w"))
die_at(int(sys.argv[2]))
run.prune(1)
os._exit(0)
"""
    )
    code, count = 9, 0
    while code == 9:
        path = tmp_path / str(count)
        code = python(script, path, count).wait()
        run = opened(path, {})
        assert 1 <= len(run.checkpoints()) <= 3
        assert all((folder / "a_weight").exists() for _, folder in run.checkpoints())
        count += 1
    assert code == 0 and count > 6


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("(os error 28)")])
def test_a_full_disk_is_said_with_the_free_bytes_and_what_to_do(tmp_path, monkeypatch, error):
    run = opened(tmp_path)
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr(
        atomic.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 4096, "total": usage.f_blocks})
    )

    def write(folder):
        (folder / "part").write_bytes(b"x" * 1000)
        raise ValueError("cannot serialise") from error

    with pytest.raises(CheckpointError, match=r"disk is full: 4096 bytes were free after 1000 .*Free some"):
        run.write_checkpoint(3, write)
    assert names(run.checkpoints_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def _torch_save(folder):
    import torch

    torch.save({"w": torch.zeros(2**20)}, folder / "optimizer.pt")


def _safetensors(folder):
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2**20)}, folder / "model.safetensors")


def _plain(folder):
    (folder / "model.bin").write_bytes(b"x" * 2**22)


@pytest.mark.parametrize("write", [_plain, _torch_save, _safetensors])
def test_on_a_disk_that_is_really_full_the_run_keeps_its_last_checkpoint(small_disk, write):
    run = opened(small_disk / "run")
    run.write_checkpoint(1, save("x" * 1000))
    with pytest.raises(CheckpointError, match="The disk is full"):
        run.write_checkpoint(2, write)
    assert names(run.checkpoints_path) == ["step_000001"]
    run.write_checkpoint(3, save("y"))  # there is room again
    latest = run.latest_checkpoint()
    assert latest and latest[0] == 3


def test_a_metrics_row_that_does_not_fit_is_not_there_in_part(small_disk):
    run = opened(small_disk / "run")
    run.append_metrics({"step": 1})
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(Exception, match="The disk is full"):
        run.append_metrics({"step": 2, "text": "x" * 10_000})
    assert run.metrics_path.read_text() == '{"step": 1}\n'
    filler.unlink()
    run.append_metrics({"step": 3})
    assert [row["step"] for row in run.read_metrics()] == [1, 3]
