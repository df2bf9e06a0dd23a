#!/bin/bash
set -e
python3 - <<'PY'
import json
path = "/app/settings.json"
settings = json.load(open(path))
settings["port"] = 8443
settings["allowed_hosts"].append("backup.example")
json.dump(settings, open(path, "w"), indent=2)
PY
