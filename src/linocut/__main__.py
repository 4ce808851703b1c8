"""`python -m linocut` is the same as `linocut`."""

from linocut.cli import main

if __name__ == "__main__":
    main()
