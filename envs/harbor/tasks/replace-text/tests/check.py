import subprocess
import sys
from pathlib import Path

texts = {path.name: path.read_text() for path in Path("/app/garden").glob("*.py")}
assert set(texts) == {"__init__.py", "__main__.py", "plants.py"}
done = subprocess.run([sys.executable, "-m", "garden"], cwd="/app", capture_output=True, text=True, timeout=20)
assert done.stdout == "{'name': 'fern', 'water_level': 25} False after water\n", done
again = "import garden; assert garden.VERSION == '1.2 (water)'; garden.irrigate; assert not hasattr(garden, 'water')"
subprocess.run([sys.executable, "-c", again], cwd="/app", check=True, timeout=20)
again = "from garden import plants; assert not hasattr(plants, 'water') and plants.underwater({'water_level': 101})"
subprocess.run([sys.executable, "-c", again], cwd="/app", check=True, timeout=20)
