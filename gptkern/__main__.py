"""``python -m gptkern``."""

from gptkern.cli import main

if __name__ == "__main__":
    main()
