"""Train, generate, attribute and report on the embedded digits.

provgen demo --output demo
"""

import time
from pathlib import Path
from typing import Annotated

import typer

from provgen import cli


def main(
    output: Annotated[Path, typer.Option(help="Run folder; a demo in it is resumed.")] = Path("runs/demo"),
) -> None:
    """Run the whole job on the embedded digits: train, generate 64 digits with sources, report."""
    start = time.perf_counter()
    cli.say("1/3 training a generator together with its provenance network")
    cli.load_recipe("train")(config=cli.recipes_folder() / "digits.yaml", overrides=[f"output_dir={output}"])
    cli.say("2/3 generating digits and tracing each to its sources")
    cli.load_recipe("generate_and_attribute")(run=output, num_images=64, top_k=8, closed_form=True)
    cli.say("3/3 writing the report")
    cli.load_recipe("analyze")(run=output)
    cli.say(
        f"done in {time.perf_counter() - start:.0f} s: open {output / 'report.html'}, or {output / 'samples/grid.png'}"
    )


if __name__ == "__main__":
    cli.run(main)
