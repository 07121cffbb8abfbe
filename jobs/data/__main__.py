"""``python -m jobs.data convert IN OUT``; see `jobs.data.convert`."""

from jobs import main
from jobs.data.convert import run

if __name__ == "__main__":
    main(run)
