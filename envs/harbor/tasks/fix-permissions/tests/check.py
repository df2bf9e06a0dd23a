from pathlib import Path

site = Path("/app/site")
files = ["index.html", "style/main.css", "bin/publish.sh", "private/key.txt"]
assert sorted(files) == sorted(str(p.relative_to(site)) for p in site.rglob("*") if p.is_file())
for path in [site, *site.rglob("*")]:
    mode = 0o755 if path.is_dir() or path.suffix == ".sh" else 0o600 if path.name == "key.txt" else 0o644
    assert path.stat().st_mode & 0o777 == mode, f"{path}: {path.stat().st_mode:o}"
