"""Many models, trained one by one: which of them a call and a process train, and how far they are."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from provgen.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A share of the models: `number` of `count`, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `1/2`.

        Raises:
            InputError: Not two numbers, or not one of the parts.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--shard must be a number of how many, such as 1/2, got {text}")
        return cls(int(match[1]), int(match[2]))

    def share(self, models: Sequence[T]) -> list[T]:
        """Take every `count`-th model, so that parts are about equally long."""
        return list(models[self.number - 1 :: self.count])


def missing_models(
    models: Sequence[T],
    is_there: Callable[[T], bool],
    *,
    part: Shard,
    accelerator: Accelerator,
    folder: Path,
    say: Callable[[str], None],
    describe: Callable[[T], str] = str,
) -> Iterator[T]:
    """Yield what this process has to train, and say how far it is; all processes end together.

    Args:
        models: All of them.
        is_there: Whether a model has been measured.
        part: Of this call.
        accelerator: Its processes share the part out.
        folder: Where models are measured into.
        say: Prints a line.
        describe: Names a model.
    """
    missing = [model for model in part.share(models) if not is_there(model)]
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    waiting = missing[accelerator.process_index :: accelerator.num_processes]
    if accelerator.is_main_process:
        say(f"{len(models)} models into {folder}, {len(missing)} of this part are missing")
    start = time.perf_counter()
    for done, model in enumerate(waiting, start=1):
        yield model
        left = (time.perf_counter() - start) / done * (len(waiting) - done) / 60
        say(f"[{done}/{len(waiting)}] {describe(model)}; about {left:.0f} min left")
    accelerator.wait_for_everyone()
