"""Commands called in the process of a test."""

from collections.abc import Callable


def exit_code_and_errors(main: Callable[[], None], capsys) -> tuple[int, str]:
    """Call a command; return its exit code and what it wrote to stderr."""
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, capsys.readouterr().err
