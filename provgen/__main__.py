"""`python -m provgen` is `provgen`."""

from provgen.cli import main

main()
