"""The README and the pages of docs/ say what is so: their blocks run, and what they name is there.

Shell and Python blocks run in order, page by page, in one shell as a reader would have it, against one Nexus. A block
after `<!-- not run here: why -->` does not, and is listed in `NOT_RUN`; its commands are compared with the command
line, as are those within the prose.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from deployments.cli import app
from nexus.config import load_config
from nexus.policy import parse_rule
from tests.routes import ROUTES
from tests.running import ROOT, Running, free_port

PAGES = ("docs/use.md", "docs/operate.md", "docs/extend.md", "docs/understand.md", "README.md")  # the README stops it
FENCE = re.compile(r"^(?:<!-- not run here: (?P<why>.+) -->\n)?```(?P<language>.*)\n(?P<code>(?s:.*?))^```$", re.M)
FILE = re.compile(r"# (?P<name>[a-z_/-]+\.(?:yaml|py))\b")
NOT_RUN = {
    "README.md": ("make demo", "make install"),
    "docs/use.md": ("nexus athena",),
    "docs/operate.md": (
        "NEXUS_HOME=~/other",
        "ARANGO_ADMINISTRATOR=",
        "nexus reindex --embedder",
        "nexus coordinator add",
        "nexus plan --config",
        "nexus node certificate",
        "deployments/compose/install.sh",
        "kubectl create",
        "serve deploy",
        "grep 8f0c2d5e",
    ),
}


@dataclass(frozen=True)
class Block:
    """Some lines between fences, and why they do not run here, if they do not."""

    page: str
    line: int
    language: str
    code: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    found = [
        Block(page, text.count("\n", 0, match.start("code")) + 1, match["language"], match["code"], match["why"])
        for match in FENCE.finditer(text)
    ]
    assert text.count("\n```") == 2 * len(found), f"{page}: a fence is not closed, or is indented"
    return found


def prose_of(page: str) -> str:
    """The page without its blocks."""
    return FENCE.sub("", (ROOT / page).read_text())


def spans_of(page: str) -> list[str]:
    """What stands between single backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def test_every_page_of_the_folder_is_looked_at() -> None:
    assert {f"docs/{path.name}" for path in (ROOT / "docs").iterdir()} == set(PAGES) - {"README.md"}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_says_what_it_is(block: Block) -> None:
    assert block.language in ("sh", "python", "yaml")


def test_what_does_not_run_is_listed_here() -> None:
    for page in PAGES:
        left_out = [block for block in blocks_of(page) if block.why is not None]
        expected = NOT_RUN.get(page, ())
        say = f"{page}: say in NOT_RUN how these begin, in order: {[str(block) for block in left_out]}"
        assert len(left_out) == len(expected), say
        for block, beginning in zip(left_out, expected, strict=True):
            assert block.code.startswith(beginning), say


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# ── settings ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_settings_and_policies_are_taken_as_they_stand(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "nexus.yaml"
    file.write_text(block.code)
    if "conditions:" in block.code:
        assert parse_rule(yaml.safe_load(block.code), "cold").actions
        return
    monkeypatch.setenv("NEXUS_HAMMERSPACE__PASSWORD", "of-the-anvil")
    assert set(yaml.safe_load(block.code)) <= set(load_config(file).model_dump())


# ── commands, routes, files and links that are only named ───────────────────────────────────────


def fault_of(command: str) -> str | None:
    """What the command line does not know of a command; None where it knows all of it."""
    tokens = shlex.split(command, comments=True)[1:]
    known: Any = typer.main.get_command(app)
    while tokens and tokens[0] in getattr(known, "commands", {}):
        known = known.commands[tokens.pop(0)]
    if getattr(known, "commands", None) and tokens and not tokens[0].startswith("-"):
        return f"there is no `{tokens[0]}` in `nexus {known.name or ''}`"
    options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [token for token in tokens if re.match(r"--?[a-z]", token) and token.partition("=")[0] not in options]
    return f"`{known.name}` has no {unknown[0]}" if set(unknown) - {"--help"} else None


def commands() -> Iterator[tuple[str, str]]:
    for block in BLOCKS:
        if block.language == "sh":
            for line in block.code.splitlines():
                if match := re.match(r"(?:[A-Z_]+=\S+ )*(nexus .*)", line):
                    yield str(block), match[1]
    for page in PAGES:
        for span in spans_of(page):
            if re.match(r"nexus [a-z]", span):
                yield page, span


@pytest.mark.parametrize(("place", "command"), sorted(set(commands())))
def test_a_command_that_is_named_is_there(place: str, command: str) -> None:
    assert fault_of(command) is None, place


@pytest.mark.parametrize(
    "command", ["nexus upp", "nexus key make x", "nexus ask --loud x", "nexus jobs -x", "nexus share put f --nme=x"]
)
def test_a_command_that_is_not_there_is_found(command: str) -> None:
    assert fault_of(command)


def paths_named(page: str) -> Iterator[str]:
    for span in spans_of(page):
        if re.fullmatch(r"(?:nexus|cluster|actors|deployments|tests|docs)/[\w./-]+", span):
            yield span
    for module in re.findall(r"python -m ((?:tests|deployments|nexus)[\w.]+)", (ROOT / page).read_text()):
        yield module.replace(".", "/").removesuffix("/NAME")


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_is_named_is_there(page: str) -> None:
    missing = [path for path in paths_named(page) if not any((ROOT / f"{path}{end}").exists() for end in ("", ".py"))]
    assert [path for path in missing if not re.search(r"/(x|y|NAME|qdrant)\.", path)] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_link_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", prose_of(page))
    assert [link for link in links if not ((ROOT / page).parent / link.partition("#")[0]).is_file()] == []


def routes_named() -> Iterator[tuple[str, str, str]]:
    methods = r"(?:GET|PUT|POST|DELETE|HEAD)"
    for page in PAGES:
        for span in spans_of(page):
            if match := re.match(rf"({methods}) (/[\w/{{}}-]+)", span):
                yield page, match[1], match[2]


@pytest.mark.parametrize(("page", "method", "path"), sorted(set(routes_named())))
def test_a_route_that_is_named_is_there(page: str, method: str, path: str) -> None:
    def pattern(route: str) -> str:
        return re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(route.replace(":path", "")))

    assert any(route.method == method and re.fullmatch(pattern(route.path), path) for route in ROUTES), path


# ── and all together, on a running Nexus ────────────────────────────────────────────────────────


def script(page: str, running: Running) -> str:
    """A page as one shell script, in which each block says its place before it begins."""
    lines = ["set -euo pipefail", "trap 'echo \"in the block $BLOCK\" >&2' ERR"]
    for block in blocks_of(page):
        if block.why is not None:
            continue
        code = block.code.replace("http://127.0.0.1:8000", running.url).replace("nx_…", running.key)
        code = code.replace("http://127.0.0.1:8265", running.instance.dashboard)
        lines.append(f"BLOCK={block}")
        if file := FILE.match(block.code):
            lines.append(f"mkdir -p $(dirname {file['name']})")
            lines.append(f"cat > {file['name']} <<'END OF BLOCK'\n{code}END OF BLOCK")
        elif block.language == "python":
            lines.append(f"python - <<'END OF BLOCK'\n{code}END OF BLOCK")
        elif block.language == "sh":
            lines.append(code)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, dict[str, str]]]:
    """Somebody with a home folder, manuals in it and a Nexus that runs, whose tiers are set."""
    home = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "deployments" / "manuals", home / "manuals")
    tiers = {name: home / name for name in ("hot", "cold")}
    for folder in tiers.values():
        folder.mkdir()
    nexus_home = home / "nexus"
    nexus_home.mkdir(mode=0o700)
    settings = {"policies": {"tiers": {name: f"file:{folder}" for name, folder in tiers.items()}}}
    (nexus_home / "nexus.yaml").write_text(yaml.safe_dump(settings))
    running = Running(nexus_home, free_port())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        running.must("up", "--wait", "600", timeout=630)
        yield running, {**running.environment, "HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT)}
    finally:
        running.must("down")


@pytest.mark.system
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_runs_from_top_to_bottom(page: str, reader: tuple[Running, dict[str, str]], tmp_path: Path) -> None:
    running, environment = reader
    done = subprocess.run(
        ["bash", "-c", script(page, running)], cwd=tmp_path, env=environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
