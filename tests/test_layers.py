"""Imports point one way, the kind of generator is decided in one place, and what is heavy is imported late."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ORDER = (
    {"errors"}, {"settings"}, {"settings_file"}, {"run"}, {"data"}, {"models"}, {"metrics"}, {"generators"},
    {"training", "tracing"}, {"pipeline"}, {"build"}, {"evaluation"}, {"report"}, {"studies"}, {"cli"},
)  # fmt: skip
"""Folders and modules of `provgen/`. Each may import those before it; those beside it know nothing of one another."""

LAYERS = [layer for group in ORDER for layer in sorted(group)]
ALONE = {"metrics": {"errors"}}
"""Layers that import no more than these, whatever their order."""

KIND_READERS = ("provgen/build.py", "provgen/settings.py")
"""Where a kind of generator may be decided upon."""

KINDS = {"DiffusionGenerator", "VaeGenerator", "ClassifierGenerator"}


def imports_of(path: Path, *, at_import_time=False) -> list[tuple[int, str]]:
    """List `(line, dotted module)`; `from a import b` counts as a.b, which may be a name of the module a."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for_type_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if at_import_time and id(node) in inside_functions | for_type_checkers:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def layer_of(module: str) -> str | None:
    """The second part of `provgen.LAYER...`; None for the package itself, such as `provgen.__version__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


def place_of(layer: str) -> int:
    return next(place for place, group in enumerate(ORDER) if layer in group)


def misdirected(source: str, module: str, line: int, imported: str) -> str | None:
    """Say what is wrong with an import of provgen by the layer `source`, if anything."""
    if imported.split(".")[0] != "provgen" or imported == "provgen.__version__":
        return None
    target = layer_of(imported)
    if target is None:
        return f"{module}:{line} imports {imported}, which is in no layer"
    if target == source:
        return None
    if place_of(target) > place_of(source):
        return f"{module}:{line} imports {imported}, but {source} comes before {target}"
    if place_of(target) == place_of(source) or target not in ALONE.get(source, set(LAYERS)):
        return f"{module}:{line} imports {imported}, but {source} knows nothing of {target}"
    return None


def test_the_rule_catches_an_import_that_points_the_wrong_way():
    assert misdirected("data", "provgen/data/x.py", 3, "provgen.models.y.z") == (
        "provgen/data/x.py:3 imports provgen.models.y.z, but data comes before models"
    )
    assert misdirected("data", "provgen/data/x.py", 3, "provgen.data.y") is None
    assert misdirected("cli", "provgen/cli.py", 3, "provgen.errors.InputError") is None
    assert misdirected("cli", "provgen/cli.py", 3, "provgen.__version__") is None
    assert misdirected("data", "provgen/data/x.py", 3, "provgen.helpers.y") is not None
    assert misdirected("training", "provgen/training/x.py", 3, "provgen.tracing.y") is not None
    assert misdirected("tracing", "provgen/tracing/x.py", 3, "provgen.training.y") is not None
    assert misdirected("metrics", "provgen/metrics/x.py", 3, "provgen.data.y") is not None
    assert misdirected("metrics", "provgen/metrics/x.py", 3, "provgen.errors.InputError") is None
    assert misdirected("report", "provgen/report/x.py", 3, "provgen.studies.y") is not None


def test_imports_point_one_way(repository):
    package = repository / "provgen"
    wrong, seen = [], set()
    for path in sorted(package.rglob("*.py")):
        # python -m provgen is the command line by another name.
        source = path.relative_to(package).parts[0].removesuffix(".py").replace("__main__", "cli")
        name = str(path.relative_to(repository))
        if source == "__init__":
            at_once = [module for _, module in imports_of(path, at_import_time=True)]
            assert not [module for module in at_once if module.startswith("provgen")], "names load when asked for"
            continue
        assert source in LAYERS, f"{name} is in no layer"
        seen.add(source)
        imports = imports_of(path)
        wrong += [complaint for line, module in imports if (complaint := misdirected(source, name, line, module))]
    assert wrong == []
    assert seen == set(LAYERS), "the list of layers names what does not exist"


def test_nothing_above_them_imports_the_studies(repository):
    package = repository / "provgen"
    wrong = [
        f"{path.relative_to(repository)}:{line}"
        for path in sorted(package.rglob("*.py"))
        if "studies" not in path.relative_to(package).parts
        for line, module in imports_of(path)
        if module.startswith("provgen.studies")
    ]
    assert wrong == []


def order_in(text: str) -> tuple[set[str], ...]:
    """Read the one block of indented or fenced lines that starts with `errors <`."""
    (block,) = re.findall(r"^[ \t]*(errors\s*<(?:.*\n)(?:[ \t]*<.*\n|[ \t]*[\w, ]+ <.*\n)*)", text, re.MULTILINE)
    return tuple({layer.strip() for layer in group.split(",")} for group in block.split("<"))


@pytest.mark.parametrize(
    "block",
    [
        "    errors < data\n      < training, tracing < cli\n",
        "```\nerrors < data < training, tracing\n  < cli\n```\n",
        "    errors < data <\n    training, tracing < cli\n",
    ],
)
def test_the_order_is_read_over_several_lines(block):
    text = f"# Layers\n\nImports point one way:\n\n{block}\nA recipe never imports a recipe < this.\n"
    assert order_in(text) == ({"errors"}, {"data"}, {"training", "tracing"}, {"cli"})


def test_the_order_is_the_one_that_contributors_are_told(repository):
    assert order_in((repository / "CONTRIBUTING.md").read_text(encoding="utf-8")) == ORDER


def decisions_on_kinds(source: str) -> list[int]:
    """List the lines that compare, match or look up a generator's kind, or ask for its class."""
    tree = ast.parse(source)
    names = {"generator"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _is_generator(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    asked = [(node.lineno, inner) for node in ast.walk(tree) for part in decided_on(node) for inner in ast.walk(part)]
    return sorted({
        line
        for line, inner in asked
        if (isinstance(inner, ast.Name) and inner.id in KINDS)
        or (isinstance(inner, ast.Attribute) and inner.attr == "kind" and _is_generator(inner.value, names))
    })  # fmt: skip


def decided_on(node: ast.AST) -> list[ast.expr]:
    """Give the expressions whose values a node decides upon."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Match):
        return [node.subject]
    if isinstance(node, ast.Subscript):
        return [node.slice]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "startswith"):
        return [*node.args, node.func.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
        return node.args[1:]
    return []


def _is_generator(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression is the settings of a generator: `x.generator`, or a name given to one."""
    return (isinstance(node, ast.Attribute) and node.attr == "generator") or (
        isinstance(node, ast.Name) and node.id in names
    )


@pytest.mark.parametrize(
    ("source", "is_decision"),
    [
        ("if settings.generator.kind == 'vae': pass", True),
        ("x = 1 if 'none' != run.settings.generator.kind else 2", True),
        ("chosen = settings.generator\nx = chosen.kind in ('vae', 'none')", True),
        ("make = KINDS[settings.generator.kind]", True),
        ("make = KINDS.get(generator.kind)", True),
        ("match settings.generator.kind:\n    case 'vae': pass", True),
        ("x = isinstance(generator, VaeGenerator)", True),
        ("x = isinstance(generator, (int, DiffusionGenerator))", True),
        ("x = verdict.kind == kind", False),
        ("raise InputError(f'got generator.kind={settings.generator.kind}')", False),
        ("x = isinstance(generator, list)", False),
    ],
)
def test_a_decision_on_a_kind_is_found_wherever_it_hides(source, is_decision):
    assert bool(decisions_on_kinds(source)) == is_decision


def test_the_kind_of_generator_is_decided_upon_in_build_alone(repository):
    paths = [*(repository / "provgen").rglob("*.py"), *(repository / "recipes").rglob("*.py")]
    found = [
        f"{name}:{line}"
        for path in sorted(paths)
        if (name := path.relative_to(repository).as_posix()) not in KIND_READERS
        for line in decisions_on_kinds(path.read_text(encoding="utf-8"))
    ]
    assert found == []
    assert decisions_on_kinds((repository / "provgen/build.py").read_text(encoding="utf-8")), "the search finds them"


def test_recipes_import_the_package_and_never_one_another(repository):
    recipes = sorted((repository / "recipes").rglob("*.py"))
    assert {path.parent.name for path in recipes} == {"recipes", "data"}
    names = {path.stem for path in recipes}
    allowed = {"provgen", "torch", "typer", "rich", "accelerate", "numpy", "PIL", "resvg_py"} | set(
        sys.stdlib_module_names
    )
    for path in recipes:
        for line, module in imports_of(path):
            first = module.split(".")[0]
            assert first not in names | {"recipes"}, f"{path.name}:{line} imports the recipe {module}"
            assert "recipes" not in module.split("."), f"{path.name}:{line} imports the recipe {module}"
            assert first in allowed, f"{path.name}:{line} imports {module}"


def test_the_command_line_starts_without_torch(repository):
    package = repository / "provgen"
    todo, done, heavy = [package / "cli.py", package / "__init__.py"], set(), []
    while todo:
        path = todo.pop()
        done.add(path)
        for line, module in imports_of(path, at_import_time=True):
            if module.split(".")[0] in {
                "torch",
                "torchvision",
                "diffusers",
                "accelerate",
                "numpy",
                "sklearn",
            }:
                heavy.append(f"{path.relative_to(repository)}:{line} imports {module}")
            for depth in range(2, len(module.split(".")) + 1):
                inner = package.parent.joinpath(*module.split(".")[:depth])
                found = [inner.with_suffix(".py"), inner / "__init__.py"]
                todo += [p for p in found if p.is_relative_to(package) and p.is_file() and p not in done]
    assert heavy == []
    assert package / "errors.py" in done, "the search follows imports"


@pytest.mark.launch
def test_the_pipeline_is_imported_without_what_reports_and_studies_need(repository):
    """In an interpreter of its own, as other packages may import them too."""
    heavy = ("matplotlib", "sklearn", "provgen.report", "provgen.studies")
    program = f"import sys, provgen.pipeline; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True, timeout=300
    )
    assert result.stdout.strip() == "[]"
