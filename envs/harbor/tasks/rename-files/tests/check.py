from pathlib import Path

expected = {
    "2030-11-03-report.txt": "report 03-11-2030.txt",
    "2031-02-17-report.txt": "report 17-02-2031.txt",
    "2029-12-09-report.txt": "report 09-12-2029.txt",
    "2031-02-28-summary.txt": "summary 28-02-2031.txt",
    "readme.txt": "readme.txt",
}
found = {path.name: path.read_text() for path in Path("/app/reports").iterdir()}
assert found == {new: f"This is {old}\n" for new, old in expected.items()}, found
