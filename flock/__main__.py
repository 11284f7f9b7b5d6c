"""``python -m flock`` is the command ``flockapi``."""

from flock.command.cli import main

if __name__ == "__main__":
    main(prog_name="flockapi")
