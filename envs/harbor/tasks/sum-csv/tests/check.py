with open("/app/totals.csv") as file:
    lines = file.read().split()
assert lines == ["region,total", "east,20046.43", "north,10619.90", "south,21012.11", "west,20029.62"], lines
