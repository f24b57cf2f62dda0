"""Write requirements.lock: the versions that pip would install for all extras together with torch 2.13.0.

Nothing is installed. Python must be the oldest that Levin supports, for which every extra has packages.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = "# A pip constraints file, written by `make lock`. pip takes the build of torch that it finds: CUDA, or CPU.\n"


if __name__ == "__main__":
    if sys.version_info[:2] != (3, 11):
        sys.exit("levin: make lock needs Python 3.11: type make lock PYTHON=python3.11")
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    arguments = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "torch==2.13.0"]
    command = [sys.executable, "-m", "pip", *arguments, f"{ROOT}[{','.join(extras)}]"]
    output = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if output.returncode:
        sys.exit("levin: pip found no versions, for the reason above; requirements.lock is as it was")
    packages = [package["metadata"] for package in json.loads(output.stdout)["install"]]
    pins = {package["name"]: package["version"].split("+")[0] for package in packages if package["name"] != "levin"}
    lines = sorted((f"{name}=={version}" for name, version in pins.items()), key=str.lower)
    (ROOT / "requirements.lock").write_text(HEADER + "".join(f"{line}\n" for line in lines))
