"""The house rules, checked on the source itself."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = ("nexus", "cluster", "actors", "deployments")  # each may import those before it
MAY_IMPORT_RAY = ("actors/", "deployments/", "cluster/bootstrap.py")
HTTP_SERVERS = {"fastapi", "starlette", "uvicorn"}
HTTP_CLIENTS = {"httpx", "httpcore", "requests", "aiohttp"}
MAY_CALL_HTTP = (
    "deployments/",
    "nexus/anvil.py",
    "nexus/upstream.py",
    "nexus/image_hosts.py",
    "nexus/key_sets.py",
    "nexus/models/triton.py",
)
HIDING_NAMES = {"utils", "common", "helpers", "base", "manager"}
MAY_CATCH_ALL = {"deployments/middleware.py", "nexus/parsing.py"}
LONGEST_FUNCTION = 70
TOP_LEVEL = {
    *FLOORS,
    "tests",
    "docs",
    "pyproject.toml",
    "README.md",
    "Makefile",
    "requirements.lock",
    "requirements-test.lock",
    "requirements-vllm.lock",
}

SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports(path: Path) -> frozenset[str]:
    """Top-level names of everything imported anywhere in the file, inside functions too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            found.add(node.module.partition(".")[0])
    return frozenset(found)


def importing(names: set[str], may: tuple[str, ...]) -> list[str]:
    """The sources that import one of these, and may not."""
    return [name_of(path) for path in SOURCES if not name_of(path).startswith(may) and names & imports(path)]


def test_imports_go_down() -> None:
    for number, floor in enumerate(FLOORS):
        above = set(FLOORS[number + 1 :])
        below = tuple(f"{other}/" for other in FLOORS if other != floor)
        assert importing(above, may=below) == []


def test_ray_is_imported_only_where_said() -> None:
    assert importing({"ray"}, MAY_IMPORT_RAY) == []


def test_http_is_served_only_in_deployments() -> None:
    assert importing(HTTP_SERVERS, ("deployments/",)) == []


def test_http_is_called_only_where_said() -> None:
    assert importing(HTTP_CLIENTS, MAY_CALL_HTTP) == []


def test_no_name_hides_what_is_inside() -> None:
    assert [name_of(path) for path in SOURCES if path.stem in HIDING_NAMES] == []


def opens_with_a_sentence(path: Path) -> bool:
    opening = ast.get_docstring(tree(path))
    return bool(opening) and opening.partition("\n")[0].endswith((".", ":"))


def test_every_module_opens_with_a_sentence() -> None:
    assert [name_of(path) for path in SOURCES if not opens_with_a_sentence(path)] == []


def test_functions_fit_on_a_screen() -> None:
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= LONGEST_FUNCTION, f"{name_of(path)}:{node.lineno} {node.name} has {length} lines"


def test_broad_excepts_are_rare_and_reasoned() -> None:
    for path in SOURCES:
        lines = path.read_text().splitlines()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = {one.id for one in ast.walk(node.type) if isinstance(one, ast.Name)} if node.type else {"all"}
                reraises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                if caught & {"all", "Exception", "BaseException"} and not reraises:
                    assert name_of(path) in MAY_CATCH_ALL, f"{name_of(path)}:{node.lineno} catches everything"
                    assert "#" in lines[node.lineno - 1], f"{name_of(path)}:{node.lineno} does not say why"


def test_the_top_level_is_fixed() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = {name.partition("/")[0] for name in tracked.splitlines()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


def test_nexus_lists_its_public_names() -> None:
    nexus = importlib.import_module("nexus")
    public = {
        name for name, value in vars(nexus).items() if not name.startswith("_") and not hasattr(value, "__path__")
    }
    public -= {name for name in public if f"nexus.{name}" in sys.modules}
    assert set(nexus.__all__) == public


def test_a_planted_fault_is_seen(tmp_path: Path) -> None:
    """The walker sees imports that hide in functions: the rules above would otherwise mean little."""
    module = tmp_path / "hiding.py"
    module.write_text("def later():\n    import ray\n    from deployments import app\n")
    assert imports(module) == {"ray", "deployments"}


def test_the_command_line_starts_without_what_only_servers_need() -> None:
    heavy = "{'ray', 'torch', 'fastapi', 'transformers', 'pymilvus', 'prometheus_client', 'fsspec', 'jinja2'}"
    asked = f"import sys, deployments.cli; print(sorted({heavy} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
