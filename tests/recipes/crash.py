"""Kill a command just before its k-th file operation under a run folder, for many k, and look what is left.

    python tests/recipes/crash.py EVERY RUN SCRATCH COMMAND [OPTION ...]

RUN is a finished run; every trial works on a copy of it at SCRATCH. Prints one JSON object: `operations`, how many
there are; `outcomes`, for every k that was tried what each group of files is: old, new or MIXED, which is a fault.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from provgen import cli
from provgen.run import require_run

GROUPS = {
    "samples": ("samples",),
    "report": ("report", "report.html", "report.json", "verdicts.parquet"),
    "pipeline": ("pipeline",),
}
"""What means something only together."""

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}


def main() -> None:
    """Run the trials, and print what became of them."""
    every, run, scratch, *command = sys.argv[1:]
    finished, root = Path(run).resolve(), Path(scratch).resolve()
    torch.set_num_threads(1)
    cli.load_recipe(cli.COMMANDS[command[0]][0])  # imports once what every child needs
    old = state_of(finished)
    operations = trial(finished, root, command, kill_at=None)
    new = state_of(root)
    # From the end back: what is put in place is put there last.
    tried = range(operations, 0, -int(every))
    outcomes = {}
    for number in tried:
        trial(finished, root, command, kill_at=number)
        left = state_of(root)
        outcomes[number] = {name: named(left[name], old[name], new[name]) for name in GROUPS}
    sys.stdout.write(json.dumps({"operations": operations, "outcomes": outcomes}) + "\n")


def trial(finished: Path, root: Path, command: list[str], kill_at: int | None) -> int:
    """Run a command on a fresh copy of a run in a child of this process; give the number of its operations."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(finished, root, symlinks=True)
    count = root.with_name("count")
    child = os.fork()
    if child == 0:
        operate(root, command, kill_at, count)
    _, status = os.waitpid(child, 0)
    if kill_at is None:
        assert status == 0, "the command works if nobody kills it"
        return int(count.read_text())
    assert os.WIFSIGNALED(status), f"operation {kill_at} was not reached"
    require_run(root)  # brings back what was moved away
    return kill_at


def operate(root: Path, command: list[str], kill_at: int | None, count: Path) -> None:
    """Run a command, counting operations; never returns."""
    done = 0

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal done
        is_exchange = event == "ctypes.dlsym" and arguments[-1] == "renameat2"
        if is_exchange or (event in EVENTS and str(arguments[0]).startswith(f"{root}{os.sep}")):
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.addaudithook(look)
    sys.argv = ["provgen", command[0], *[part.replace("RUN", str(root)) for part in command[1:]]]
    status: int | str | None = 0
    try:
        cli.main()
    except SystemExit as end:
        status = end.code
    count.write_text(str(done))
    os._exit(0 if status in (0, None) else 1)


def state_of(root: Path) -> dict[str, str]:
    """Give a digest of the files of every group."""
    return {name: digest([root / path for path in paths]) for name, paths in GROUPS.items()}


def digest(paths: list[Path]) -> str:
    """Hash names and contents; through links, as readers do."""
    found = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found.update(f"{file.relative_to(path)}\0".encode() + file.read_bytes())
    return found.hexdigest()


def named(left: str, old: str, new: str) -> str:
    """Say what was left."""
    return "old" if left == old else "new" if left == new else "MIXED"


if __name__ == "__main__":
    main()
