import subprocess
import tempfile
from pathlib import Path


def counted(folder):
    done = subprocess.run(["bash", "/app/count_words.sh", folder], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


found = counted("/app/notes")
assert found == [["apples.txt", "3"], ["cherries.txt", "1"], ["pears and plums.txt", "5"]], found
with tempfile.TemporaryDirectory(prefix="with space ") as folder:
    Path(folder, "a  b.txt").write_text("x y")
    Path(folder, "c*.txt").write_text("")
    Path(folder, "other.md").write_text("not counted")
    assert counted(folder) == [["a  b.txt", "2"], ["c*.txt", "0"]]
