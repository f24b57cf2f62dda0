"""Write requirements.lock: the versions that pip would install for all extras together with torch 2.13.0.

Nothing is installed.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = "# A pip constraints file, written by `make lock`. pip takes the build of torch that it finds: CUDA, or CPU.\n"

if __name__ == "__main__":
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    arguments = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "torch==2.13.0"]
    output = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, f"{ROOT}[{','.join(extras)}]"],
        check=True,
        capture_output=True,
        text=True,
    )
    packages = [package["metadata"] for package in json.loads(output.stdout)["install"]]
    pins = {package["name"]: package["version"].split("+")[0] for package in packages if package["name"] != "levin"}
    lines = sorted((f"{name}=={version}\n" for name, version in pins.items()), key=str.lower)
    (ROOT / "requirements.lock").write_text(HEADER + "".join(lines))
