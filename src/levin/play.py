"""Record the policy of a run as a video. `python -m levin.play run=...`; needs no display."""

from levin.config import cli
from levin.core.errors import exit_on_user_error
from levin.training.video import record_video


def main() -> None:
    """Print where the videos are."""
    with exit_on_user_error():
        for path in record_video(**cli.command_arguments(record_video)):
            print(path)


if __name__ == "__main__":
    main()
