"""Rebuild all that follows from the stored curves. `python -m levin.report [check=true]`.

Of each result: the header of `config.yaml`, `summary.json`, `curve.png`. Of all: the tables in `experiments/README.md`
and `README.md`, and `experiments/aggregate.png`.
"""

from levin.config import cli
from levin.core import paths
from levin.core.errors import ConfigError, exit_on_user_error
from levin.results import figures
from levin.results.result import (
    Result,
    find_broken,
    result_folders,
)
from levin.results.tables import expected_texts


def report(*, check: bool = False) -> list[str]:
    """Write everything that follows from the curves, or only compare.

    Args:
        check: Write nothing.

    Returns:
        One sentence for each file that is not what it should be.

    Raises:
        ConfigError: A result lacks its reference or a source in it.
    """
    results = [Result.read(cell) for cell in result_folders()]
    faults = {result.name: list(find_broken(result)) for result in results}
    wrong = [f"{name}: {each}" for name, found in faults.items() for each in found]
    if wrong and not check:
        raise ConfigError("; ".join(wrong))
    texts = dict(expected_texts([result for result in results if not faults[result.name]]))
    for path, text in texts.items():
        if not path.is_file() or path.read_text() != text:
            wrong.append(f"{path.relative_to(paths.ROOT)} does not follow from the curves")
            if not check:
                path.write_text(text)
    for path, source, draw in figures.expected(results):
        if figures.read_description(path) != source:
            wrong.append(f"{path.relative_to(paths.ROOT)} was not drawn from these curves")
            if not check:
                draw()
    return wrong


def main() -> None:
    """Say what was rebuilt; with check=true, what is wrong, and exit 1."""
    with exit_on_user_error():
        arguments = cli.command_arguments(report)
        wrong = report(**arguments)
    if arguments.get("check"):
        print("\n".join(wrong) or "every number follows from its curves")
        raise SystemExit(1 if wrong else 0)
    print(
        "\n".join(each.replace(" does not follow", ": rebuilt, did not follow") for each in wrong)
        or "nothing to rebuild"
    )


if __name__ == "__main__":
    main()
