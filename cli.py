"""Launches npvlm from a checkout: `python cli.py ...` is the command `npvlm ...`."""

from npvlm.cli import main

if __name__ == "__main__":
    main()
