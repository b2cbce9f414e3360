"""Files that a stranger can hand in, damaged, and read as the product reads them.

    python -m tests.fuzz [KIND...] [--count N] [--seconds S] [--first NUMBER]

Each has to be read, or refused by one of edgepeft's errors in one line: no other exception, no crash, nothing
that takes more than 10 s or more memory than 64 MiB and four times the file. Counts are printed by kind, and
of
each fault the number of the first file that shows it; `--first NUMBER --count 1` reads that one again.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz import kinds
from tests.fuzz.runner import run


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the number of faulty files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND")
    parser.add_argument("--count", type=int, default=1000, help="files of each kind")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for each kind, at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    options = parser.parse_args(arguments)
    total = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder, work = Path(scratch) / "whole", Path(scratch) / "work"
        folder.mkdir()
        # In a process of its own: onnxruntime's threads would be lost in a fork.
        making = (
            "import sys; from pathlib import Path; from tests.fuzz.kinds import make; make(Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", making, str(folder)], check=True)
        known = kinds.kinds(folder)
        for name in options.kinds or known:
            work.mkdir()
            began_s = time.perf_counter()
            done = run(name, known[name](), work, options.count, options.seconds, options.first)
            shutil.rmtree(work)
            took_s = time.perf_counter() - began_s
            print(
                f"{name}: {done.files} files, {done.read} read, {done.refused} refused, "
                f"{sum(done.faults.values())} faulty ({took_s:.0f} s)"
            )
            for told, count in done.faults.most_common():
                print(f"  {count} x {told}, first {done.first[told]}")
            sys.stdout.flush()
            total += sum(done.faults.values())
    return total


if __name__ == "__main__":
    sys.exit(min(main(), 1))
