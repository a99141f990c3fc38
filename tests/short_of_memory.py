"""`python -m mlkd_dist.distill` with the words given, in a process that from its first step on gets
so many MiB more, the first word."""

import resource
import sys
from pathlib import Path

from mlkd_dist import distill, stage


def main() -> int:
    more, *words = sys.argv[1:]
    step = stage.train_step

    def limited(*args: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + int(more) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        step(*args)

    stage.train_step = limited
    return distill.main(words)


if __name__ == "__main__":
    sys.exit(main())
