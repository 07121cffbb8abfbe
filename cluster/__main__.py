"""``python -m cluster`` is the `springtide` command."""

from cluster.cli.commands import main

if __name__ == "__main__":
    main()
