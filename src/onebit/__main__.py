"""`python -m onebit` is `onebit`."""

from onebit.cli import main

main()
