"""Record the policy of a run as a video, without a display: `python -m levin.play run=...`."""

from levin.config import cli
from levin.core.errors import exit_on_user_error
from levin.core.process import share_cores
from levin.training.video import record_video


def main() -> None:
    """Record the videos and print their paths."""
    with exit_on_user_error():
        share_cores()
        for path in record_video(**cli.command_arguments(record_video)):
            print(path)


if __name__ == "__main__":
    main()
