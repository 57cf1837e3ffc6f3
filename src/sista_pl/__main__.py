"""`python -m sista_pl` is `sista`."""

from sista_pl.cli import console

if __name__ == "__main__":
    console()
