"""Rebuild the files that are generated from the stored curves: `python -m levin.report [check=true]`.

Per result these are the header of `config.yaml`, `summary.json` and `curve.png`. For all results together: the tables
in `experiments/README.md` and `README.md`, and `experiments/aggregate.png`.
"""

from levin.config import cli
from levin.core import files, paths
from levin.core.errors import ConfigError, exit_on_user_error
from levin.results import figures
from levin.results.result import (
    Result,
    find_broken,
    result_folders,
)
from levin.results.tables import expected_texts


def report(*, check: bool = False) -> list[str]:
    """Rebuild all generated files that are out of date, or only check them.

    Args:
        check: Only report; write nothing.

    Returns:
        One message per file that was out of date, and with `check` per fault that can't be rebuilt.

    Raises:
        ConfigError: A result has no valid reference.yaml, or a fault that can't be rebuilt (without `check`).
    """
    results = [Result.read(folder) for folder in result_folders()]
    faults = {result.name: list(find_broken(result)) for result in results}
    wrong = [f"{name}: {fault}" for name, messages in faults.items() for fault in messages]
    if wrong and not check:
        raise ConfigError("; ".join(wrong))
    texts = dict(expected_texts([result for result in results if not faults[result.name]]))
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            wrong.append(f"{path.relative_to(paths.ROOT)} does not match the stored data")
            if not check:
                files.write_text(path.parent, path.name, text)
    for path, source, draw in figures.expected_figures(results):
        if figures.read_fingerprint(path) != source:
            wrong.append(f"{path.relative_to(paths.ROOT)} does not match the stored data")
            if not check:
                draw()
    return wrong


def main() -> None:
    """Print what was rebuilt. With check=true print what is out of date or wrong, and exit 1 if anything is."""
    with exit_on_user_error():
        arguments = cli.command_arguments(report)
        wrong = report(**arguments)
    if arguments.get("check"):
        print("\n".join(wrong) or "every generated file matches the stored data")
        raise SystemExit(1 if wrong else 0)
    print(
        "\n".join(message.replace(" does not match", ": rebuilt, did not match") for message in wrong)
        or "nothing to rebuild"
    )


if __name__ == "__main__":
    main()
