"""`python -m nextn` is the `nextn` command."""

from nextn.cli.main import main

main()
