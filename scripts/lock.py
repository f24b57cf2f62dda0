"""Write requirements.lock and uv.toml: the versions that pip would install for all extras together with torch 2.13.0.

pip reads the first and uv the second; both hold the same versions. Nothing is installed.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV_HEADER = "# The versions of requirements.lock for `uv sync`, written by `make lock`.\n"
HEADER = "# A pip constraints file, written by `make lock`. pip takes the build of torch that it finds: CUDA, or CPU.\n"


def write_uv(pins: list[str], path: Path) -> None:
    """Write versions as constraints of uv, which resolves the project's extras under them."""
    lines = "".join(f'    "{pin}",\n' for pin in pins)
    path.write_text(f"{UV_HEADER}constraint-dependencies = [\n{lines}]\n", encoding="utf-8")


if __name__ == "__main__":
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    arguments = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "torch==2.13.0"]
    output = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, f"{ROOT}[{','.join(extras)}]"],
        check=True,
        capture_output=True,
        text=True,
    )
    packages = [package["metadata"] for package in json.loads(output.stdout)["install"]]
    pins = {package["name"]: package["version"].split("+")[0] for package in packages if package["name"] != "levin"}
    lines = sorted((f"{name}=={version}" for name, version in pins.items()), key=str.lower)
    (ROOT / "requirements.lock").write_text(HEADER + "".join(f"{line}\n" for line in lines))
    write_uv(lines, ROOT / "uv.toml")
