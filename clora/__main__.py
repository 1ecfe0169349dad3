"""`python -m clora`, and under torchrun: `torchrun -m clora train ...`; the same as the console script."""

from clora.cli.commands import main

if __name__ == "__main__":
    main()
