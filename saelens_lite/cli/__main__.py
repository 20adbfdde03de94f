"""`python -m saelens_lite.cli`, where the installed command is not on the path."""

from saelens_lite.cli import main

if __name__ == "__main__":
    main()
