"""`python -m locos_fast` is the command line."""

from locos_fast.cli.app import main

main()
