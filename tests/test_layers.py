"""Imports point one way, and the command line starts without torch."""

import ast
import sys
from pathlib import Path

LAYERS = (
    "errors", "settings", "settings_file", "run", "data", "models", "metrics", "generators", "training", "tracing",
    "pipeline", "build", "evaluation", "report", "studies", "cli",
)  # fmt: skip
STRANGERS = {"training": {"tracing"}, "tracing": {"training"}, "metrics": {"settings", "run", "data", "models"}}
"""Layers that never import one another, whatever their order."""


def imports_of(path: Path, *, at_import_time=False) -> list[tuple[int, str]]:
    """List `(line, dotted module)`; `from a import b` counts as a.b, which may be a name of the module a."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside_functions = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if at_import_time and id(node) in inside_functions:
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


def misdirected(source: str, module: str, line: int, imported: str) -> str | None:
    """Say what is wrong with an import of provgen by the layer `source`, if anything."""
    if imported.split(".")[0] != "provgen":
        return None
    target = layer_of(imported)
    if target is None:
        return f"{module}:{line} imports {imported}, which is in no layer"
    if LAYERS.index(target) > LAYERS.index(source):
        return f"{module}:{line} imports {imported}, but {source} comes before {target}"
    if target in STRANGERS.get(source, ()):
        return f"{module}:{line} imports {imported}, but {source} and {target} know nothing of one another"
    return None


def test_the_rule_catches_an_import_that_points_the_wrong_way():
    assert misdirected("data", "provgen/data/x.py", 3, "provgen.models.y.z") == (
        "provgen/data/x.py:3 imports provgen.models.y.z, but data comes before models"
    )
    assert misdirected("data", "provgen/data/x.py", 3, "provgen.data.y") is None
    assert misdirected("cli", "provgen/cli.py", 3, "provgen.errors.InputError") is None
    assert misdirected("data", "provgen/data/x.py", 3, "provgen.helpers.y") is not None


def test_imports_point_one_way(repository):
    package = repository / "provgen"
    wrong, seen = [], set()
    for path in sorted(package.rglob("*.py")):
        source = path.relative_to(package).parts[0].removesuffix(".py")
        name = str(path.relative_to(repository))
        imports = imports_of(path)
        if source == "__init__":
            assert not imports_of(path, at_import_time=True), "`import provgen` imports nothing"
            continue
        assert source in LAYERS, f"{name} is in no layer"
        seen.add(source)
        wrong += [complaint for line, module in imports if (complaint := misdirected(source, name, line, module))]
    assert wrong == []
    assert seen == set(LAYERS), "the list of layers names what does not exist"


def test_recipes_import_the_package_and_never_one_another(repository):
    recipes = sorted((repository / "recipes").glob("*.py"))
    assert len(recipes) >= 3
    names = {path.stem for path in recipes}
    allowed = {"provgen", "torch", "typer", "rich", "accelerate", "numpy", "PIL"} | set(sys.stdlib_module_names)
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
