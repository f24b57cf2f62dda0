"""The documentation executed: every command, every block of Python and every diff of the pages works as it is printed.

A page is a session of one reader: its blocks run in order, in a copy of the repository, and the runs of earlier lines
exist for later ones. Trainings are short (tests/support/shortened.py), after their words were checked as they are
typed. A block after "Save as `my_module.py`" is saved there. Blocks of other languages, such as text, are not run.
"""

import pytest
import yaml

from levin.config.compose import compose
from levin.core.paths import CONFIGS
from levin.training.session import build_run
from pages import ROOT, Checkout, PageError, Session, read_blocks

FOLDERS = ("_build", "api", "_ext")
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "src/**/*.md", "experiments/*.md")
    for path in ROOT.glob(pattern)
    if not set(FOLDERS) & set(path.relative_to(ROOT).parts) and read_blocks(path.read_text())
)
NOT_RUN = {  # pattern of the beginning of a command, or of code -> why only the names and values in it are checked
    r"make bench": "needs the libraries of `make bench-setup`, and minutes",
    r"make (docs|lint)": "CI runs them",
    r"make drill": "minutes; tests/drill.py has tests of its own",
    r"make lock": "asks the package index",
    r"make proof": "minutes; test_proof.py tests it",
    r"make study": "up to two hours",
    r"make test": "runs the tests, these among them",
    r".*launcher=slurm": "needs SLURM; test_slurm_jobs.py tests it",
    r".*trainer.devices=": "several processes; test_data_parallel.py tests them",
    r"(\.venv/bin/)?pip |apt-get ": "installs packages",
    r"git clone|cd ": "the checkout is there, and is the working directory",
    r"def training_step\(": "an excerpt; test_the_readme_shows_code_of_sac_as_it_is compares it with the file",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("documentation") / "levin")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_block_of_a_page_works(page, checkout):
    checkout.reset()
    Session(str(page), checkout, NOT_RUN).run((ROOT / page).read_text())


@pytest.mark.parametrize("preset", ["smoke", "profile"])
def test_a_short_preset_is_long_enough_for_updates_of_every_algorithm(preset):
    total = yaml.safe_load((CONFIGS / f"debug/{preset}.yaml").read_text())["total_env_steps"]
    late = {}
    for file in (CONFIGS / "algo").glob("*.yaml"):
        own = CONFIGS / f"debug_algo/{preset}_{file.name}"
        algo = {}
        for each in (file, *([own] if own.exists() else [])):
            algo |= yaml.safe_load(each.read_text())["algo"]
        first = algo.get("learning_starts", algo.get("collect_env_steps", 0))
        if first >= total:
            late[file.stem] = first
    assert not late


@pytest.mark.parametrize(
    "words", ["algo=dreamer env=pendulum", "algo=dreamer_v3 env=pendulum", "algo=world_models env=dodge"]
)
def test_a_smoke_run_of_a_world_model_can_be_built(words):
    """Its `learning_starts` and its replay have room for a sequence of each env."""
    _, rollouts = build_run(compose([*words.split(), "debug=smoke", "trainer.accelerator=cpu"]))
    rollouts.collector.shutdown()


TRAIN = "make train ALGO=ppo ENV=cartpole STEPS=1000"
BROKEN = {
    "an unknown key": (
        f"```sh\n{TRAIN} ARGS='algo.gama=0.9'\n```",
        r"page.md:2: make train .*\n.*\n.*algo.gama is unknown",
    ),
    "a value that a test would replace": (f"```sh\n{TRAIN} ARGS='algo.batch_size=0'\n```", "algo.batch_size"),
    "a value of a command that is not run": (
        f"```sh\n{TRAIN} ARGS='-m launcher=slurm algo.gama=1'\n```",
        "algo.gama is unknown",
    ),
    "an unknown variable of make": ("Text\n\n```sh\nmake train ALG=ppo\n```", "page.md:4: .*\n.*\n.*ALG is unknown"),
    "an unknown command of make": ("```sh\nmake  # help\nmake nothing\n```", "page.md:3: make nothing"),
    "a run that does not exist": ("```sh\nmake evaluate RUN=runs/none\n```", "runs/none holds no checkpoint"),
    "a program that fails": ("```sh\nls runs/none && ls\n```", "page.md:2: ls runs/none\nexit code 2"),
    "Python that fails": (
        "```python\nx = 1\n```\n\n```python\nassert x == 1\nprint('seen')\nx.y\n```",
        r"page.md:6: Python\nseen\n(.*\n)+.*line 8(.*\n)+AttributeError",
    ),
    "a diff that does not apply": (
        "```diff\n--- a/README.md\n+++ b/README.md\n@@ -1 +1 @@\n-# Levi\n+# Leviathan\n```",
        "page.md:2: git apply\n.*\n.*README.md",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_block_that_does_not_work_is_named_with_its_output(case, checkout):
    text, message = BROKEN[case]
    checkout.reset()
    with pytest.raises(PageError, match=message):
        Session("page.md", checkout, NOT_RUN).run(text)


PAGE = """
Save this as `my_module.py`:

```python
def double(x):
    return 2 * x
```

1. A list, and a command in two lines:

   ```sh
   # a comment
   mkdir \\
     folder && touch folder/file  # another
   ```

```python
from pathlib import Path

from my_module import double

assert Path("folder/file").exists()
Path("written").write_text(str(double(4)))
```

```diff
--- a/written
+++ b/written
@@ -1 +1 @@
-8
\\ No newline at end of file
+9
```

```text
make nothing
```
"""


def test_blocks_run_in_order_in_the_checkout(checkout):
    checkout.reset()
    Session("page.md", checkout, NOT_RUN).run(PAGE)
    assert (checkout.folder / "written").read_text() == "9\n"
    checkout.reset()
    assert not (checkout.folder / "written").exists()
