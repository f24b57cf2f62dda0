"""Record the policy of a run as a video. `python -m levin.play run=...`; needs no display."""

from levin.config import cli
from levin.core.errors import one_sentence
from levin.training.video import play


def main() -> None:
    """Print where the videos are."""
    with one_sentence():
        for path in play(**cli.arguments(play)):
            print(path)


if __name__ == "__main__":
    main()
