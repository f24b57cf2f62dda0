"""Write requirements.lock: what pip would install for all extras together, without installing it."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = "# A pip constraints file, written by `make lock`. pip takes the build of torch that it finds: CUDA, or CPU.\n"

if __name__ == "__main__":
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "torch==2.13.0"]
    answer = subprocess.run(
        [sys.executable, "-m", "pip", *words, f"{ROOT}[{','.join(extras)}]"], check=True, capture_output=True, text=True
    )
    found = [each["metadata"] for each in json.loads(answer.stdout)["install"]]
    pins = {each["name"]: each["version"].split("+")[0] for each in found if each["name"] != "levin"}
    lines = sorted((f"{name}=={version}\n" for name, version in pins.items()), key=str.lower)
    (ROOT / "requirements.lock").write_text(HEADER + "".join(lines))
