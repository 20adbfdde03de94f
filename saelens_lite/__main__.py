"""Run the command line as `python -m saelens_lite`, in case the installed command is not on the path."""

from saelens_lite.cli import main

if __name__ == "__main__":
    main()
