"""`python -m npvlm` is the command `npvlm`."""

from npvlm.cli import main

main()
