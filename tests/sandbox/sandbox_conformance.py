"""What any backend of `Sandbox` must do. A backend's test class inherits this and gives `sandbox` and `make`.

Its sandboxes run the image of `sandbox.base_image`, as root, with a user called `user` and a 32 MB tmpfs at /small.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from errors import DataError, SandboxError
from sandbox.types import ExecResult, Sandbox, SandboxConfig, TimedOut

CONFIG = SandboxConfig(tmpfs_mb={"/small": 32}, memory_mb=512, pids=64, max_output_bytes=1000)
Make = Callable[[SandboxConfig], Awaitable[Sandbox]]


async def run(sandbox: Sandbox, command: str, timeout_s: float = 20.0, **options) -> ExecResult:
    return await sandbox.run_command(command, timeout_s=timeout_s, **options)


async def out(sandbox: Sandbox, command: str, **options) -> str:
    """What a command that must succeed prints."""
    result = await run(sandbox, command, **options)
    assert result.exit_code == 0, result
    return result.stdout.decode()


async def running(sandbox: Sandbox) -> list[str]:
    """The command lines inside, but for the sandbox's own and the one that asks."""
    init = "[ $f = /proc/1/cmdline ]"  # by its number: each engine has another
    listing = f"for f in /proc/[0-9]*/cmdline; do {init} || tr '\\0' ' ' < $f 2>/dev/null; echo; done"
    lines = (await out(sandbox, listing)).splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(("tr ", "bash "))]


class Commands:
    async def test_output_error_and_exit_code_are_told_apart(self, sandbox: Sandbox):
        result = await run(sandbox, "echo out; echo err >&2; (exit 7)")
        assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 7)
        assert not result.truncated and not result.shell_lost and not result.oom_killed

    async def test_cd_exports_functions_and_arrays_stay(self, sandbox: Sandbox):
        await run(sandbox, "cd /tmp; export A=1; B=2; f() { echo f$1; }; declare -A m=([k]=v); set -- x y")
        assert await out(sandbox, "pwd; echo $A $B ${m[k]} $2; f 3; env | grep -c ^A=") == "/tmp\n1 2 v y\nf3\n1\n"

    async def test_environment_and_folder_can_be_for_one_command(self, sandbox: Sandbox):
        await run(sandbox, "cd /var; export A=outer")
        options = {"env": {"A": "it's", "B": "$HOME\n"}, "workdir": "/usr/lib"}
        assert await out(sandbox, 'pwd; echo "$A$B"; env | grep -c ^A=', **options) == "/usr/lib\nit's$HOME\n\n1\n"
        assert await out(sandbox, "pwd; echo $A$B") == "/var\nouter\n"
        assert await out(sandbox, "cd /etc; export C=3; pwd", workdir="/") == "/etc\n"
        assert await out(sandbox, "pwd; echo $C") == "/var\n3\n"

    async def test_a_missing_folder_is_the_commands_failure(self, sandbox: Sandbox):
        result = await run(sandbox, "touch /tmp/ran", workdir="/nowhere")
        assert result.exit_code == 1 and b"/nowhere: No such file" in result.stderr
        assert (await run(sandbox, "test -e /tmp/ran")).exit_code == 1

    async def test_users_have_shells_of_their_own(self, sandbox: Sandbox):
        await run(sandbox, "cd /tmp; A=root")
        assert await out(sandbox, "id -un; echo $HOME $A; pwd", user="user") == "user\n/home/user\n/app\n"
        assert await out(sandbox, "id -un; echo $A; pwd") == "root\nroot\n/tmp\n"

    async def test_input_is_the_bytes_given_or_empty(self, sandbox: Sandbox):
        data = bytes(range(256)) * 300 + b"'\\n%s\0"
        result = await run(sandbox, "cat", stdin=data, max_output_bytes=10**6)
        assert result.stdout == data
        assert await out(sandbox, "cat; read line; echo $?; head -c 5 | wc -c") == "1\n0\n"
        assert await out(sandbox, "true", stdin=b"x" * 10**6) == ""  # unread
        assert await out(sandbox, "read a; echo $a; python3 -c 'print(input())'", stdin=b"1\n2\n") == "1\n2\n"

    async def test_binary_output_is_kept(self, sandbox: Sandbox):
        result = await run(sandbox, r"printf '\0\377\r\n\0'; printf '\1\0' >&2")
        assert (result.stdout, result.stderr) == (b"\0\xff\r\n\0", b"\1\0")

    async def test_long_output_is_its_head_and_tail(self, sandbox: Sandbox):
        result = await run(sandbox, "seq 100000; echo small >&2", max_output_bytes=20)
        whole = "".join(f"{n}\n" for n in range(1, 100001)).encode()
        assert result.stdout == whole[:10] + whole[-10:]
        assert (result.stdout_bytes, result.stderr) == (len(whole), b"small\n")
        assert result.truncated
        assert f"[… {len(whole) - 20} bytes left out …]" in result.stdout_text

    async def test_the_configured_limit_holds_without_another(self, sandbox: Sandbox):
        result = await run(sandbox, "head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2")
        assert len(result.stdout) == len(result.stderr) == CONFIG.max_output_bytes
        assert result.stdout_bytes == result.stderr_bytes == 100000

    async def test_a_long_command_runs(self, sandbox: Sandbox):
        text = "é'\"$\\\n" * 20000
        command = f"cat > /tmp/long << 'END'\n{text}END\nwc -c < /tmp/long"
        assert await out(sandbox, command) == f"{len(text.encode())}\n"

    async def test_length_changes_nothing_that_a_command_sees(self, sandbox: Sandbox):
        await run(
            sandbox, "set -a; TMOUT=1; export LC_ALL=C.UTF-8; greet() { echo hello $*; }; K=kept; fail() { return 3; }"
        )
        padding = f"# {'é' * 70_000}"  # longer than one argument of a program may be
        seen = "greet $K $A; cat | sort -u; pwd; env | wc -c; set | grep -c '^__text\\|^__input'; echo a\\\\b; fail"
        for command, data in [
            (seen, b"in\n"),
            (f"{seen}\n{padding}", b"in\n" * 50_000),
            (f"{padding}\n{seen}", b"in\n"),
            (seen, b"in\n" * 50_000),
        ]:
            result = await run(sandbox, command, stdin=data, workdir="/tmp", env={"A": "given"})
            *before, size, names, after = result.stdout.decode().splitlines()
            assert (before, names, after) == (["hello kept given", "in", "/tmp"], "0", "a\\b")
            assert int(size) < 2000 and (result.exit_code, result.stderr) == (3, b"")
        assert (await run(sandbox, "pwd")).stdout == b"/app\n"

    async def test_commands_of_several_tasks_are_served_in_order(self, sandbox: Sandbox):
        async with anyio.create_task_group() as tasks:
            for n in range(20):
                tasks.start_soon(run, sandbox, f"echo {n} >> /tmp/order")
        assert sorted((await out(sandbox, "cat /tmp/order")).split(), key=int) == [str(n) for n in range(20)]

    async def test_nothing_of_our_environment_is_inside(self, sandbox: Sandbox):
        os.environ["SECRET_OF_THE_HOST"] = "secret"
        try:
            names = {line.partition("=")[0] for line in (await out(sandbox, "env")).splitlines()}
        finally:
            del os.environ["SECRET_OF_THE_HOST"]
        known = {"HOME", "HOSTNAME", "LANG", "PATH", "PWD", "OLDPWD", "SHLVL", "_", "BASH_ENV", "PROTEGE_COMMAND"}
        podmans = {"TERM", "container"}  # xterm and podman, wherever it runs
        assert names <= known | podmans

    @pytest.mark.parametrize("command", ["echo 'x", 'echo "x', "echo $(", "if", "f() {", ")", "a;;b", "x=$((", "[[ a"])
    async def test_a_syntax_error_is_exit_code_2_and_a_message(self, sandbox: Sandbox, command: str):
        expected = 2 if int(await out(sandbox, "A=1; echo ${BASH_VERSINFO[0]}")) >= 5 else 1
        result = await run(sandbox, command)
        assert result.exit_code == expected and result.stderr and not result.shell_lost
        again = await run(sandbox, "echo $A")
        assert again.stdout == b"1\n" or again.shell_lost  # some versions of bash crash over some of these, afterwards

    async def test_an_unfinished_heredoc_ends_with_the_command(self, sandbox: Sandbox):
        result = await run(sandbox, "cat << END\nhi")
        assert result.stdout == b"hi\n" and b"here-document" in result.stderr

    async def test_a_nul_byte_is_refused_to_the_command_not_to_us(self, sandbox: Sandbox):
        result = await run(sandbox, "echo a\0b")
        assert result.exit_code == 2 and b"NUL" in result.stderr

    async def test_what_is_no_text_is_passed_on(self, sandbox: Sandbox):
        assert (await run(sandbox, "printf '\ud83d' | wc -c")).stdout == b"3\n"  # half of a pair, as JSON can hold


class Tampering:
    """Commands that turn on the shell that they run in. Each account is true, and the next command works."""

    @pytest.mark.parametrize(
        ("command", "exit_code"),
        [
            ("exit 5", 5),
            ("(exit 3); exit", 3),
            ("exec sh -c 'exit 6'", 6),
            ("exec /nowhere", 127),
            ("set -e; false; echo no", 1),
            ("set -u; echo $NOT_SET; echo no", 1),
            ("echo ${NOT_SET?no}", 1),
            ("source <(echo exit 4)", 4),
            ("kill -9 $$", 137),
            ("kill $$", 143),
        ],
    )
    async def test_what_ends_the_shell_is_told_and_the_next_is_new(
        self, sandbox: Sandbox, command: str, exit_code: int
    ):
        await run(sandbox, "export A=1")
        result = await run(sandbox, f"echo before; {command}")
        assert (result.exit_code, result.shell_lost, result.stdout) == (exit_code, True, b"before\n")
        after = await run(sandbox, "echo $A-; pwd")
        assert (after.stdout, after.shell_lost) == (b"-\n/app\n", True)
        assert not (await run(sandbox, "true")).shell_lost

    @pytest.mark.parametrize(
        "command",
        [
            "exec >&-",
            "exec 2>&- 0<&-",
            "exec > /tmp/elsewhere 2>&1",
            "set -e",
            "set -u",
            "set -o pipefail -o noglob",
            "trap 'echo DEBUGGED; false' DEBUG ERR RETURN",
            "trap 'echo bye' EXIT TERM INT HUP",
            "PS4='$(touch /tmp/ps4)'; PROMPT_COMMAND='exit 1'; PS1=x; IFS=012abc; CDPATH=/tmp",
            "shopt -s expand_aliases; alias builtin=false eval=false printf=false set=false trap=false export=false",
            "eval() { :; }; printf() { :; }; set() { :; }; trap() { :; }; export() { :; }; cd() { :; }",
            "unset PATH; unset PWD; unset HOME",
            "set -o posix",
            "break; continue; return 3",
            "readonly A=1; A=2; echo $((1/0))",
            "rm -rf /tmp/* /usr/bin/*",
            "umask 777; ulimit -f 0",
            "unset PROTEGE_COMMAND; export PROTEGE_COMMAND=x",
            "cd /; mkdir /tmp/gone; cd /tmp/gone; rmdir /tmp/gone",
            "set -x; set -v",
        ],
    )
    async def test_what_changes_the_shell_does_not_reach_our_part_of_it(self, sandbox: Sandbox, command: str):
        assert (await run(sandbox, command)).stdout_bytes < 50
        result = await run(sandbox, "echo out; echo err >&2; (exit 9)", workdir="/", env={"X": "1"})
        assert (result.exit_code, result.stdout, result.stderr) == (9, b"out\n", b"err\n")

    async def test_tracing_shows_the_command_and_nothing_of_ours(self, sandbox: Sandbox):
        result = await run(sandbox, "set -x; echo a")
        assert (result.stdout, result.stderr) == (b"a\n", b"++ echo a\n")

    @pytest.mark.parametrize(
        "command",
        ["set -n", "builtin() { :; }", "exec 10>&- 11>&- 12>&- 13>&-; sleep 9", "kill -STOP $$"],
    )
    async def test_a_shell_that_no_longer_answers_is_replaced(self, sandbox: Sandbox, command: str):
        for _ in range(2):
            try:
                result = await run(sandbox, f"{command}; echo done", timeout_s=1.5)
            except TimedOut:
                break
            if result.shell_lost:
                break
        result = await run(sandbox, "echo alive")
        assert result.stdout == b"alive\n" and result.shell_lost

    async def test_printing_all_that_it_can_find_ends_nothing_early(self, sandbox: Sandbox):
        result = await run(
            sandbox, "set; env; cat /proc/$$/environ /proc/$$/cmdline; declare -f; history; echo END; exit 3"
        )
        assert result.exit_code == 3 and result.stdout.endswith(b"END\n")

    async def test_our_part_of_the_input_cannot_be_read(self, sandbox: Sandbox):
        assert await out(sandbox, "cat <&0; cat /dev/stdin; cat /proc/self/fd/0; bash -c 'cat'; echo $?") == "0\n"


class Ends:
    async def test_a_hung_command_is_ended_with_all_that_it_started(self, sandbox: Sandbox):
        hang = "sleep 901 & setsid sleep 902 & (setsid env -i sleep 903 &); (while :; do sleep 904; done) & echo on"
        with pytest.raises(TimedOut) as caught:
            await run(sandbox, f"{hang}; sleep 905", timeout_s=1)
        assert caught.value.result.stdout == b"on\n"
        assert (await run(sandbox, "echo next")).shell_lost
        assert await running(sandbox) == []

    async def test_what_earlier_commands_left_survives_a_later_hang(self, sandbox: Sandbox):
        await run(sandbox, "sleep 901 & setsid sleep 902 &")
        with pytest.raises(TimedOut):
            await run(sandbox, "sleep 903", timeout_s=0.5)
        assert sorted(await running(sandbox)) == ["sleep 901", "sleep 902"]

    @pytest.mark.parametrize(
        "command", ["while :; do :; done", "cat /dev/zero", "yes >&2", "trap '' TERM INT HUP; sleep 900"]
    )
    async def test_any_kind_of_hang_ends(self, sandbox: Sandbox, command: str):
        started = time.monotonic()
        with pytest.raises(TimedOut):
            await run(sandbox, command, timeout_s=1)
        assert time.monotonic() - started < 5
        assert await running(sandbox) == []

    async def test_children_that_hold_the_output_open_do_not_delay_the_end(self, sandbox: Sandbox):
        started = time.monotonic()
        assert await out(sandbox, "setsid sleep 900 & (sleep 901 &) ; echo done") == "done\n"
        assert time.monotonic() - started < 1
        result = await run(sandbox, "sleep 902 & echo bye; exit 4")
        assert (result.exit_code, result.stdout, result.shell_lost) == (4, b"bye\n", True)
        assert time.monotonic() - started < 6

    async def test_what_the_background_prints_comes_with_a_later_command(self, sandbox: Sandbox):
        await run(sandbox, "(sleep 0.2; echo late) &")
        await anyio.sleep(0.5)
        assert await out(sandbox, "echo now") == "late\nnow\n"

    async def test_a_fork_bomb_is_ended_and_the_sandbox_goes_on(self, sandbox: Sandbox):
        with pytest.raises(TimedOut):
            await run(sandbox, "b() { b | b & }; b; sleep 900", timeout_s=2)
        assert await out(sandbox, "echo alive") == "alive\n"
        assert await running(sandbox) == []

    async def test_a_full_disk_is_told_by_the_command(self, sandbox: Sandbox):
        result = await run(sandbox, "head -c 100000000 /dev/zero > /small/file")
        assert result.exit_code == 1 and b"No space left on device" in result.stderr
        assert await out(sandbox, "rm /small/file; echo x > /small/file; cat /small/file") == "x\n"

    async def test_memory_that_is_not_there_is_told(self, sandbox: Sandbox):
        result = await run(sandbox, "python3 -c 'x = bytearray(2 * 10**9)'")
        assert (result.exit_code, result.oom_killed) == (137, True)
        assert not (await run(sandbox, "true")).oom_killed

    async def test_a_cancelled_command_leaves_nothing(self, sandbox: Sandbox):
        with anyio.move_on_after(0.5):
            await run(sandbox, "setsid sleep 900 & sleep 901")
        assert await running(sandbox) == []
        assert await out(sandbox, "echo next") == "next\n"

    async def test_all_processes_can_be_ended(self, sandbox: Sandbox):
        await run(sandbox, "A=1; env -i setsid sleep 900 & PROTEGE_COMMAND=x sleep 901 & f() { echo f; }")
        await run(sandbox, "setsid sleep 902 &", user="user")
        await sandbox.end_processes()
        assert await running(sandbox) == []
        assert (await run(sandbox, "echo $A-; f")).exit_code == 127

    async def test_after_cleanup_nothing_works_and_cleanup_may_be_repeated(self, sandbox: Sandbox):
        await run(sandbox, "sleep 900 &")
        await sandbox.cleanup()
        await sandbox.cleanup()
        for call in (run(sandbox, "true"), sandbox.read_file("/etc/passwd"), sandbox.write_file("/x", b"")):
            with pytest.raises(SandboxError):
                await call


class Files:
    @pytest.mark.parametrize("size", [0, 1, 1000, 70_000, 20_000_000])
    async def test_bytes_come_back_as_they_went(self, sandbox: Sandbox, size: int):
        data = os.urandom(size)
        await sandbox.write_file("/tmp/new/folder/it's a $file", data)
        assert await sandbox.read_file("/tmp/new/folder/it's a $file") == data
        assert await out(sandbox, 'wc -c < "/tmp/new/folder/it\'s a \\$file"') == f"{size}\n"

    async def test_modes_owners_and_replacement(self, sandbox: Sandbox):
        await sandbox.write_file("/tmp/f", b"long content", mode=0o600)
        await sandbox.write_file("/tmp/f", b"short", mode=0o755)
        await sandbox.write_file("/tmp/g", b"", user="user")
        assert await out(sandbox, "stat -c '%a %U %s' /tmp/f /tmp/g") == "755 root 5\n644 user 0\n"

    async def test_relative_paths_begin_at_the_working_folder(self, sandbox: Sandbox):
        await run(sandbox, "cd /tmp")
        await sandbox.write_file("here/-f", b"x")
        assert await out(sandbox, "cat /app/here/-f") == "x"

    @pytest.mark.parametrize(
        ("path", "error"),
        [
            ("/nowhere", FileNotFoundError),
            ("/etc", IsADirectoryError),
            ("/etc/passwd/x", NotADirectoryError),
            ("/dev/zero", PermissionError),
            ("/tmp/pipe", PermissionError),
            ("/tmp/loop", OSError),
            ("", OSError),
            ("a\0b", OSError),
        ],
    )
    async def test_what_cannot_be_read_raises_what_fits(self, sandbox: Sandbox, path: str, error: type[OSError]):
        await run(sandbox, "mkfifo /tmp/pipe; ln -s loop /tmp/loop")
        with pytest.raises(error):
            await sandbox.read_file(path)
        assert b"root" in await sandbox.read_file("/etc/passwd")

    async def test_a_limit_is_for_reading_and_not_for_the_files_size_in_memory(self, sandbox: Sandbox):
        await run(sandbox, "truncate -s 100G /tmp/huge")
        with pytest.raises(OSError) as caught:
            await sandbox.read_file("/tmp/huge", max_bytes=1000)
        assert caught.value.errno == errno.EFBIG

    async def test_what_cannot_be_written_raises_what_fits(self, sandbox: Sandbox):
        await run(sandbox, "touch /tmp/file; chmod 700 /root")
        for path, error in (("/tmp", IsADirectoryError), ("/tmp/file/x", OSError), ("/dev/full", OSError)):
            with pytest.raises(error):
                await sandbox.write_file(path, b"x" * 100_000)
        with pytest.raises(PermissionError):
            await sandbox.write_file("/root/x", b"x" * 100_000, user="user")
        with pytest.raises(OSError) as caught:
            await sandbox.write_file("/small/x", b"x" * 40_000_000)
        assert caught.value.errno == errno.ENOSPC
        await sandbox.write_file("/tmp/file", b"next")
        assert await sandbox.read_file("/tmp/file") == b"next"

    async def test_files_are_out_of_reach_of_what_commands_do_to_their_shell(self, sandbox: Sandbox):
        await run(sandbox, "cat() { echo forged; }; head() { echo forged; }; cd /tmp; export PATH=/nowhere; umask 777")
        await sandbox.write_file("/tmp/f", b"true")
        assert await sandbox.read_file("/tmp/f") == b"true"

    async def test_a_folder_goes_and_comes_back(self, sandbox: Sandbox, tmp_path: Path):
        source = tmp_path / "source"
        (source / "deep/er").mkdir(parents=True)
        (source / "empty").mkdir()
        (source / "deep/er/data").write_bytes(os.urandom(300_000))
        (source / "run.sh").write_text("#!/bin/sh\necho ran\n")
        (source / "run.sh").chmod(0o750)
        (source / "link").symlink_to("deep/er/data")
        (source / "deep/up").symlink_to("../run.sh")
        os.link(source / "run.sh", source / "again.sh")
        await sandbox.upload_dir(source, "/tmp/there/it")
        assert await out(sandbox, "cd /tmp/there/it; ./run.sh; ./again.sh; stat -c %a run.sh; readlink link") == (
            "ran\nran\n750\ndeep/er/data\n"
        )
        assert await sandbox.download_dir("/tmp/there/it", tmp_path / "back") == ()
        back = tmp_path / "back"
        assert {str(p.relative_to(back)) for p in back.rglob("*")} == {
            str(p.relative_to(source)) for p in source.rglob("*")
        }
        assert (back / "deep/er/data").read_bytes() == (source / "deep/er/data").read_bytes()
        assert (back / "run.sh").stat().st_mode & 0o777 == 0o750
        assert os.readlink(back / "deep/up") == "../run.sh"

    async def test_a_folders_links_to_itself_come_back_as_relative_ones(self, sandbox: Sandbox, tmp_path: Path):
        make = """mkdir -p /tmp/l/in; cd /tmp/l; echo x > in/file; touch -d @1000000000 in/file
            ln -s /tmp/l/in/file whole; ln -s ../../tmp/l/in around; ln -s /tmp/l in/up; ln -s /tmp/lo other"""
        await out(sandbox, make)
        assert await sandbox.download_dir("/tmp/l", tmp_path / "back") == ("other",)
        back = tmp_path / "back"
        assert [os.readlink(back / name) for name in ("whole", "around", "in/up")] == ["in/file", "in", ".."]
        assert (back / "in/up/around/file").read_text() == "x\n"
        assert (back / "in/file").stat().st_mtime == 1e9

    async def test_files_are_read_and_written_as_whom_one_names(self, make: Make, tmp_path: Path):
        sandbox = await make(SandboxConfig(user="user", tmpfs_mb={"/small": 8}))
        (tmp_path / "source").mkdir()
        (tmp_path / "source/file").write_text("x")
        await sandbox.upload_dir(tmp_path / "source", "/small/of-root", user="0:0")
        await run(sandbox, "chmod 700 /small/of-root", user="0:0")
        assert await sandbox.read_file("/small/of-root/file", user="0:0") == b"x"
        assert await sandbox.download_dir("/small/of-root", tmp_path / "back", user="0:0") == ()
        with pytest.raises(PermissionError):
            await sandbox.read_file("/small/of-root/file")
        with pytest.raises(PermissionError):
            await sandbox.download_dir("/small/of-root", tmp_path / "none")
        with pytest.raises(PermissionError):
            await sandbox.upload_dir(tmp_path / "source", "/small/of-root")

    async def test_a_link_that_leads_out_of_an_uploaded_folder_is_refused(self, sandbox: Sandbox, tmp_path: Path):
        for link in ("/etc/passwd", "../outside", "inner/../../outside"):
            source = tmp_path / str(abs(hash(link)))
            (source / "inner").mkdir(parents=True)
            (source / "link").symlink_to(link)
            with pytest.raises(DataError, match="link"):
                await sandbox.upload_dir(source, "/tmp/x")

    async def test_a_hostile_folder_cannot_write_elsewhere(self, sandbox: Sandbox, tmp_path: Path):
        outside = tmp_path / "outside"
        outside.mkdir()
        make = f"""mkdir -p /tmp/h/sub; cd /tmp/h
            ln -s {outside} escape; ln -s ../../../../../../etc/passwd up; ln -s . here; ln -s here/../.. sly
            mkfifo pipe; echo ok > sub/fine; ln sub/fine hard; chmod 4777 sub/fine"""
        await out(sandbox, make)
        left_out = await sandbox.download_dir("/tmp/h", tmp_path / "back")
        assert sorted(left_out) == ["escape", "pipe", "sly", "up"]
        assert (tmp_path / "back/hard").read_text() == "ok\n"
        assert (tmp_path / "back/sub/fine").stat().st_mode & 0o7000 == 0
        assert list(outside.iterdir()) == []

    async def test_a_folder_that_is_missing_or_too_large_raises(self, sandbox: Sandbox, tmp_path: Path):
        with pytest.raises(FileNotFoundError):
            await sandbox.download_dir("/nowhere", tmp_path / "a")
        await run(sandbox, "mkdir /tmp/big; truncate -s 50G /tmp/big/sparse; head -c 30000000 /dev/zero > /small/zeros")
        for folder in ("/tmp/big", "/small"):
            with pytest.raises((OSError, SandboxError)):
                await sandbox.download_dir(folder, tmp_path / "b", max_bytes=10_000)


class Limits:
    async def test_there_is_no_network(self, sandbox: Sandbox):
        assert await out(sandbox, "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '") == "lo\n"

    async def test_there_are_no_capabilities_and_no_way_to_more(self, sandbox: Sandbox):
        status = await out(sandbox, "grep -E '^Cap(Prm|Eff|Bnd)' /proc/self/status")
        assert [line.split()[1] for line in status.splitlines()] == ["0" * 16] * 3
        no_new_privileges = "python3 -c 'import ctypes; print(ctypes.CDLL(None).prctl(39, 0, 0, 0, 0))'"
        assert await out(sandbox, no_new_privileges) == "1\n"

    async def test_a_read_only_root_still_has_its_tmpfs(self, make: Make):
        sandbox = await make(SandboxConfig(read_only_root=True, tmpfs_mb={"/app": 16}, workdir="/app"))
        result = await run(sandbox, "echo x > /etc/x")
        assert result.exit_code == 1 and b"Read-only file system" in result.stderr
        await sandbox.write_file("/app/file", b"x")
        assert await out(sandbox, "cat file; cp /usr/bin/true t; ./t") == "x"

    async def test_environment_folder_user_and_mounts_are_as_configured(self, make: Make, tmp_path: Path):
        (tmp_path / "data").write_text("given")
        (tmp_path / "data").chmod(0o666)
        tmp_path.chmod(0o777)
        mounts = {str(tmp_path): "/given"}
        sandbox = await make(SandboxConfig(user="user", workdir="/tmp", env={"A": "b c"}, mounts=mounts))
        assert await out(sandbox, "id -un; pwd; echo $A; cat /given/data") == "user\n/tmp\nb c\ngiven"
        assert (await run(sandbox, "echo x > /given/data; echo x > /given/new")).exit_code != 0
        assert (tmp_path / "data").read_text() == "given" and not (tmp_path / "new").exists()

    async def test_a_lease_ends_a_sandbox_that_nobody_ends(self, make: Make):
        sandbox = await make(SandboxConfig(lease_s=1))
        with pytest.raises(SandboxError):
            await run(sandbox, "sleep 20")


class SandboxConformance(Commands, Tampering, Ends, Files, Limits):
    """All of it."""
