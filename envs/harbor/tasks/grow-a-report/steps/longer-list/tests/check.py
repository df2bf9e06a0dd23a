from pathlib import Path

visits = ["heron", "robin", "heron", "wren", "robin", "heron", "wren", "wren", "wren", "finch"]
assert Path("/app/visits.txt").read_text().split() == visits
assert not Path("/app/more-visits.txt").exists()
assert Path("/app/report.txt").read_text().splitlines() == ["wren 4", "heron 3", "robin 2", "finch 1"]
