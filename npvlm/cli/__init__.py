"""The command `npvlm`: parse, call, print. NumPy is imported only once a command runs."""

from npvlm.cli.main import main

__all__ = ["main"]
