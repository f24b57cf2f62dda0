"""The documentation executed: every command, every block of Python and every diff of the pages works as it is printed.

A page is a session of one reader: its blocks run in order, in a copy of the repository, and the runs of earlier lines
exist for later ones. Trainings are short (tests/support/shortened.py), after their words were checked as they are
typed. A block after "Save as `my_module.py`" is saved there. Blocks of other languages, such as text, are not run.
"""

import pytest

from pages import ROOT, Checkout, PageError, Session, read_blocks

FOLDERS = ("_build", "api", "_ext")
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "src/**/*.md", "experiments/*.md")
    for path in ROOT.glob(pattern)
    if not set(FOLDERS) & set(path.relative_to(ROOT).parts) and read_blocks(path.read_text())
)
NOT_RUN = {  # beginning of a command -> why only the names and values in it are checked
    "make bench": "needs the libraries of `make bench-setup`, and minutes",
    "make docs": "CI builds the site",
    "make drill": "minutes; tests/drill.py has tests of its own",
    "make lint": "CI runs it",
    "make lock": "asks the package index",
    "make study": "up to two hours",
    "make test": "runs the tests, this one among them",
    "make train ALGO=ppo ENV=cartpole ARGS=\"-m launcher=slurm": "needs SLURM",
    "apt-get": "installs packages",
    ".venv/bin/pip": "installs packages",
    "git clone": "needs a network",
    "cd ": "the checkout is the working directory",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return Checkout(tmp_path_factory.mktemp("documentation") / "levin")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_block_of_a_page_works(page, checkout):
    checkout.reset()
    Session(str(page), checkout, NOT_RUN).run((ROOT / page).read_text())


BROKEN = {
    "```sh\nmake train ALGO=sac ENV=pendulum ARGS='algo.gama=0.9'\n```": "page.md:2: make train .*\n.*algo.gama is unknown",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_block_is_named_with_its_output(text, checkout):
    checkout.reset()
    with pytest.raises(PageError, match=BROKEN[text]):
        Session("page.md", checkout, NOT_RUN).run(text)
