"""``python -m fastlora``: the command line."""

from fastlora.cli.start import entry

if __name__ == "__main__":
    entry()
