"""Hostile archives write below their folder and nowhere else; hostile folders are refused."""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import time
from pathlib import Path

import pytest

from errors import DataError, SandboxError
from sandbox.archives import link_inside, pack, stays_inside, unpack


def archive(*members: tuple[str, bytes, str | bytes], mode: int = 0o644) -> io.BytesIO:
    """Of (name, type, content or link target)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, kind, what in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, mode
            if isinstance(what, bytes):
                info.size = len(what)
                tar.addfile(info, io.BytesIO(what))
            else:
                info.linkname = what
                tar.addfile(info)
    file.seek(0)
    return file


REG, DIR, SYM, LNK, FIFO, CHR = (
    tarfile.REGTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "target"


@pytest.mark.parametrize(
    "members",
    [
        [("../evil", REG, b"x")],
        [("a/../../evil", REG, b"x")],
        [("link", SYM, ".."), ("link/evil", REG, b"x")],
        [("link", SYM, "{outside}"), ("link/evil", REG, b"x")],
        [("link", SYM, "{outside}/secret"), ("link", REG, b"x")],
        [("here", SYM, "."), ("up", SYM, "here/.."), ("up/evil", REG, b"x")],
        [("hard", LNK, "../secret"), ("hard", REG, b"x")],
        [("hard", LNK, "{outside}/secret")],
        [("pipe", FIFO, ""), ("device", CHR, "")],
        [("a", REG, b"x"), ("a/evil", REG, b"x")],
        [("n" * 300, REG, b"x")],
        [("", REG, b"x"), (".", REG, b"x"), ("/", REG, b"x")],
    ],
)
def test_nothing_is_written_or_linked_outside(target: Path, members: list):
    outside = target.parent
    named = [(name, kind, w.format(outside=outside) if isinstance(w, str) else w) for name, kind, w in members]
    assert unpack(archive(*named), target, 1000) != ()
    assert everything(outside) - {f"target/{name}" for name in everything(target)} == {"secret", "target"}
    assert (outside / "secret").read_text() == "mine"
    for path in target.rglob("*"):
        assert path.resolve().is_relative_to(target.resolve())


def test_an_absolute_name_is_below_the_folder(target: Path):
    assert unpack(archive(("/etc/passwd", REG, b"x")), target, 1000) == ()
    assert everything(target) == {"etc", "etc/passwd"}


def test_what_was_there_is_replaced_and_not_written_through(target: Path):
    target.mkdir()
    (target / "link").symlink_to(target.parent / "secret")
    os.link(target.parent / "secret", target / "hard")
    (target / "folder").symlink_to(target.parent)
    left_out = unpack(archive(("link", REG, b"x"), ("hard", REG, b"y"), ("folder/evil", REG, b"z")), target, 1000)
    assert (target.parent / "secret").read_text() == "mine"
    assert (target / "link").read_bytes() == b"x" and (target / "hard").read_bytes() == b"y"
    assert left_out == ("folder/evil",) and not (target.parent / "evil").exists()


def test_set_user_bits_are_dropped_and_folders_can_be_removed_again(target: Path):
    unpack(archive(("dir", DIR, ""), ("dir/file", REG, b"x"), mode=0o6511), target, 1000)
    assert (target / "dir/file").stat().st_mode & 0o7777 == 0o511
    assert (target / "dir").stat().st_mode & 0o7777 == 0o711


def test_more_than_the_limit_is_refused(target: Path):
    with pytest.raises(SandboxError, match="more than 10 bytes"):
        unpack(archive(("a", REG, b"12345"), ("b", REG, b"123456")), target, 10)
    members = [("a", REG, b"12345678"), ("b", LNK, "a")]  # the same bytes under two names
    with pytest.raises(SandboxError):
        unpack(archive(*members), target, 10)


@pytest.mark.parametrize("junk", [b"", b"no archive at all" * 100, bytes(512) + b"\xff" * 1024])
def test_what_is_no_archive_is_a_sandbox_error_or_nothing(target: Path, junk: bytes):
    with contextlib.suppress(SandboxError):
        unpack(io.BytesIO(junk), target, 1000)
    assert everything(target) == set()


@pytest.mark.parametrize(
    ("name", "link", "inside"),
    [
        ("a", "b", True),
        ("a", ".", True),
        ("a/b", "../c/d", True),
        ("a/b", "../../c", False),
        ("a", "/etc", False),
        ("a", "b/../c", False),
        ("a/b/c", "../../x", True),
        ("a", "..", False),
    ],
)
def test_where_a_link_leads(name: str, link: str, inside: bool):
    assert stays_inside(name, link) is inside


@pytest.mark.parametrize(
    ("name", "link", "inside"),
    [
        ("a", "b", "b"),
        ("a", "/app/t/b/c", "b/c"),
        ("x/y/a", "/app/t/b", "../../b"),
        ("x/a", "/app/t", ".."),
        ("a", "/app/t", "."),
        ("a", "//app//t/./b", "b"),
        ("a", "/app/tt/b", None),
        ("a", "/app", None),
        ("a", "/app/t/../b", None),
        ("a", "../t/b", "b"),
        ("x/a", "../../../app/t/b", "../b"),
        ("x/a", "../../u/b", None),
        ("a", "../../../../app/t/b", "b"),  # above / is /
        ("a", "b/../../t/c", None),
        ("a", "", ""),
    ],
)
def test_a_link_by_way_of_its_folder_is_a_link_inside(name: str, link: str, inside: str | None):
    assert link_inside(name, link, "/app/t") == inside
    if link.startswith("/"):
        assert link_inside(name, link, "t") is None
        assert link_inside(name, link, "/app/../app/t") is None
    if inside is not None:
        assert stays_inside(name, inside)


def test_of_the_whole_root_every_absolute_link_is_inside():
    assert link_inside("a/b", "/etc/passwd", "/") == "../etc/passwd"


@pytest.mark.parametrize("seconds", [1e9, 0, -5, 1e30])
def test_times_are_kept_where_a_file_can_have_them(target: Path, seconds: float):
    member = tarfile.TarInfo("a")
    member.mtime = 0
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT) as tar:
        member.pax_headers = {"mtime": str(seconds)}
        tar.addfile(member)
    file.seek(0)
    assert unpack(file, target, 1000) == ()
    if seconds != 1e30:
        assert (target / "a").stat().st_mtime == seconds


def test_devices_and_sockets_are_not_packed(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe"):
        pack(tmp_path, io.BytesIO())


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere"):
        pack(tmp_path / "nowhere", io.BytesIO())


def test_a_hard_link_to_a_link_is_that_link_and_to_nothing_is_left_out(target: Path):
    members = [("self", SYM, "self"), ("again", LNK, "self"), ("none", LNK, "missing"), ("a", REG, b"x")]
    assert unpack(archive(*members, ("b", LNK, "./a"), ("c", LNK, "b")), target, 10**6) == ("none",)
    assert os.readlink(target / "again") == "self"
    assert (target / "b").read_bytes() == (target / "c").read_bytes() == b"x"


def test_many_hard_links_take_time_in_proportion(target: Path):
    links = [(f"link{n}", LNK, "a") for n in range(10_000)]
    started = time.process_time()
    assert unpack(archive(("a", REG, b"x"), *links), target, 10**6) == ()
    assert time.process_time() - started < 10
