"""Imports run one way:
formats -> quantize -> kernels -> models -> mlx -> pipeline -> {cli, server, eval, train, integrations}.

The order is read off the source by `ast`, so imports inside functions count too. What it buys: any inner layer can be
read, tested and replaced without knowing what is built on it.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "linocut"
LAYERS = ("formats", "quantize", "kernels", "models", "mlx", "pipeline")
OUTER = ("cli", "server", "eval", "train", "integrations")
FREE_FOR_ALL = {"errors", "__version__"}
FILES = sorted(ROOT.rglob("*.py"))


def allowed(package: str) -> set[str]:
    """The packages that `package` may import from."""
    if package in LAYERS:
        return set(LAYERS[: LAYERS.index(package) + 1])
    # The command line is a front end of its neighbours. Those know nothing of each other, but that what `train` makes
    # scenes and prompts of is what `eval` judges by.
    return {*LAYERS, package, *(OUTER if package == "cli" else ("train",) if package == "eval" else ())}


def linocut_imports(tree: ast.AST) -> set[str]:
    """First name below `linocut` of each import, e.g. "kernels" for `from linocut.kernels.problem import X`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "linocut":
            names = [f"linocut.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("linocut.")}
    return found


def top_level_imports(tree: ast.AST) -> set[str]:
    """First name of every import, e.g. "torch"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_follow_the_layers(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name_of(path)}: relative import; write it out"
    package = path.relative_to(ROOT).parts[0]
    found = linocut_imports(tree) - FREE_FOR_ALL
    if package == "errors.py":
        assert not found, "errors.py is imported by all layers, so it imports none"
    elif package == "__main__.py":
        assert found <= {"cli"}
    elif package == "__init__.py":
        # Public names resolve lazily; only type checkers read these imports, which test_lean_import makes sure of.
        assert found <= {"pipeline"}
    else:
        assert package in LAYERS + OUTER, f"{package} is a new layer: give it a place in docs and in this test"
        assert found <= allowed(package), f"{name_of(path)} reaches outwards: {sorted(found - allowed(package))}"


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] == "formats"], ids=name_of)
def test_formats_know_no_torch(path):
    found = top_level_imports(ast.parse(path.read_text(encoding="utf-8")))
    assert not found & {"torch", "transformers", "diffusers", "safetensors"}


# What computes with mlx, and so imports it. `mlx/runtime.py` can be asked about it before that.
ON_MLX = {path for path in FILES if path.parent.name == "mlx" and path.name not in ("__init__.py", "runtime.py")}
ON_MLX.add(ROOT / "pipeline" / "components_mlx.py")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_mlx_is_imported_only_once_it_was_chosen(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path in ON_MLX:
        assert path.parent.name != "mlx" or "torch" not in top_level_imports(tree), "torch stays outside of mlx/"
        return
    modules = {".".join(("linocut", *each.relative_to(ROOT).with_suffix("").parts)) for each in ON_MLX}
    at_once = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert "mlx" not in top_level_imports(at_once)
    assert not {node.module for node in at_once.body if isinstance(node, ast.ImportFrom)} & modules


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_readable(path):
    assert path.name != "utils.py", "a name that says nothing; put each function where it belongs"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 600, f"{name_of(path)} has {lines} lines: it wants a wall"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_test_dependencies_stay_in_tests(path):
    """diffusers, transformers and safetensors are what we compare with, not what we run on. Judges may be theirs."""
    found = top_level_imports(ast.parse(path.read_text(encoding="utf-8")))
    package = path.relative_to(ROOT).parts[0]
    assert package in ("integrations", "eval") or not found & {"transformers", "diffusers", "safetensors"}


def test_the_rule_would_notice():
    tree = ast.parse("def f():\n    from linocut.pipeline.generate import Pipeline\nimport linocut.kernels.dispatch\n")
    assert linocut_imports(tree) == {"pipeline", "kernels"}
    assert not linocut_imports(tree) <= allowed("models")
    assert linocut_imports(tree) <= allowed("train")
    assert "train" in allowed("eval")
    assert "eval" not in allowed("train")
