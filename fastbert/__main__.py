"""`python -m fastbert` is the command `fastbert`."""

from fastbert.cli import main

if __name__ == "__main__":
    main()
