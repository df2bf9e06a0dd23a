#!/bin/bash
set -e
python3 - <<'PY'
import csv
from collections import defaultdict
from decimal import Decimal

totals = defaultdict(Decimal)
with open("/app/sales.csv", newline="") as file:
    for row in csv.DictReader(file):
        totals[row["region"]] += int(row["quantity"]) * Decimal(row["price"])
with open("/app/totals.csv", "w") as file:
    print("region,total", file=file)
    for region in sorted(totals):
        print(f"{region},{totals[region]:.2f}", file=file)
PY
