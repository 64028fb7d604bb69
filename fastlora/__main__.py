"""``python -m fastlora``: the command line."""

from fastlora.cli.app import main

if __name__ == "__main__":
    main()
