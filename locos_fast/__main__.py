"""`python -m locos_fast` is the command line."""

from locos_fast.cli import main

main()
