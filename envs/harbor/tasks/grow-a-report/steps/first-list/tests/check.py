with open("/app/report.txt") as file:
    assert file.read().splitlines() == ["heron 3", "robin 2", "wren 1"]
