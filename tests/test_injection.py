"""No foreign text becomes a piece of a query, and no foreign bytes become objects: rows Q2, Q3 and Q8.

Rows of Q1 are in tests/test_stores.py and tests/test_retrieval.py; damaged Raft files in tests/test_raft_storage.py.
"""

import ast
import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cluster import backup, plan
from cluster.catalog import Catalog, CompareAndSet, Grant, OpenSession, Put, Unreadable, decode_response, encode
from cluster.raft import Members, Snapshot
from nexus.errors import NexusError, UpstreamInvalid
from tests.conftest import Door
from tests.test_architecture import SOURCES, name_of, tree

# ── the source: nothing is pasted into a query ──────────────────────────────────────────────────

TAKE_A_QUERY = {"execute", "executemany", "executescript", "aql"}
HOLD_A_QUERY = {"filter", "expr", "filter_expression"}  # as keyword, or as key of what becomes keywords
# The functions that make a query of parts, each with why that is safe.
RENDERERS = {
    ("nexus/database.py", "_set"): "pragmas named in the code",
    ("nexus/database.py", "_migrate"): "the scripts of the stores, and a number counted here",
    ("nexus/database.py", "_transaction"): "one of three modes named in the code",
    ("nexus/stores/sqlite.py", "matching"): "a filter's tree, of which `_condition` makes placeholders",
    ("nexus/arangodb.py", "_run"): "the statements of the stores, each looked at where it is given to `aql`",
    ("nexus/arangodb.py", "restore"): "the name of a table of the stores",
    ("nexus/stores/arango.py", "matching"): "a filter's tree, of which `_condition` makes bind parameters",
    ("deployments/grafana/dashboard.py", "_panel"): "the panels of this very file",
    ("nexus/homes.py", "_load"): "one of two conditions named in the code",
    ("nexus/homes.py", "grouped"): "columns, tables and conditions that `_load` names",
    ("nexus/interactions.py", "recent"): "a filter's tree, of which `write_condition` makes placeholders",
    ("nexus/interactions.py", "nearest"): "a filter's tree, as placeholders",
    ("nexus/interactions.py", "_forget"): "one of two conditions named in the code",
    ("nexus/interactions.py", "_insert"): "as many placeholders as there are columns",
    ("nexus/interactions.py", "clear_log"): "a number that SQLite gave",
    ("nexus/interactions_arango.py", "recent"): "a filter's tree, as bind parameters",
    ("nexus/interactions_arango.py", "nearest"): "a filter's tree, as bind parameters",
    ("nexus/stores/milvus.py", "_restrict"): "Lite has no parameters: values go through `literal`",
}


def pasted(path: Path, source: str) -> Iterator[str]:
    """Where a query is given that is not fixed in the code: `function:line`."""
    tree = ast.parse(source)
    for function in [
        tree,
        *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)),
    ]:
        name = getattr(function, "name", "")
        fixed = _fixed_names(function)
        for node in _within(function):
            for query in _queries(node):
                if not _is_fixed(query, fixed) and (name_of(path), name) not in RENDERERS:
                    yield f"{name or 'the module'}:{query.lineno}"


def _within(function: ast.AST) -> Iterator[ast.AST]:
    """Every node of a function, without those of functions inside it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _within(node)


def _queries(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TAKE_A_QUERY:
        yield from node.args[:1]
    if isinstance(node, ast.Call):
        yield from (keyword.value for keyword in node.keywords if keyword.arg in HOLD_A_QUERY)
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and key.value in HOLD_A_QUERY:
                yield value


def _fixed_names(function: ast.AST) -> frozenset[str]:
    """The local names that hold nothing but what is written in the code, wherever they are given something."""
    given = Counter(one.id for one in _within(function) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))
    given.update(one.arg for one in _within(function) if isinstance(one, ast.arg))
    of_the_code = Counter(
        target.id
        for node in _within(function)
        for target, value in _assignments(node)
        if isinstance(target, ast.Name) and _is_fixed(value, frozenset())
    )
    return frozenset(name for name, times in of_the_code.items() if times == given[name])


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Each name with what it is given, or with what it goes through."""
    if isinstance(node, ast.For):
        yield node.target, node.iter
    if isinstance(node, ast.Assign):
        for target in node.targets:
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            if len(targets) == len(values):
                yield from zip(targets, values, strict=True)


def _is_fixed(node: ast.expr, listed: frozenset[str]) -> bool:
    """Whether an expression's value is written in the code: constants, and what is put together of them alone."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.Name):
        return node.id.isupper() or node.id in listed
    if isinstance(node, ast.JoinedStr):
        return all(_is_fixed(part, listed) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _is_fixed(node.value, listed)
    if isinstance(node, ast.BinOp):
        return _is_fixed(node.left, listed) and _is_fixed(node.right, listed)
    if isinstance(node, ast.IfExp):
        return _is_fixed(node.body, listed) and _is_fixed(node.orelse, listed)
    if isinstance(node, ast.Tuple | ast.List):
        return all(_is_fixed(one, listed) for one in node.elts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        return _is_fixed(node.func.value, listed) and all(_is_fixed(one, listed) for one in node.args)
    return False


def test_Q2_no_query_is_put_together_of_what_was_given() -> None:
    assert {name_of(path): found for path in SOURCES if (found := list(pasted(path, path.read_text())))} == {}


def test_Q2_a_capital_name_is_a_constant_of_its_module() -> None:
    """So it may be in a query."""
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [one.arg for one in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs)]
                stored = (one for one in _within(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))
                names += [one.id for one in stored]
                found = [name for name in names if name.isupper() and len(name) > 1]
                assert not found, f"{name_of(path)}:{node.lineno}"


@pytest.mark.parametrize(
    "line",
    [
        'db.execute(f"SELECT * FROM t WHERE name = {name!r}")',
        'db.execute("SELECT * FROM t WHERE name = " + name)',
        'db.execute("SELECT * FROM t WHERE name = %s" % name)',
        'db.execute("SELECT * FROM t WHERE name = {}".format(name))',
        'db.execute("SELECT * FROM " + ", ".join(name))',
        "db.execute(query)",
        'db.executemany(f"DELETE FROM {name}", rows)',
        'db.aql.execute("FOR d IN @@c FILTER " + name + " RETURN d")',
        'client.search("i", filter=f"tenant == {name}")',
        'client.delete("i", filter="id in " + str(name))',
        'client.query("i", **{"filter": "a == %s" % name})',
        'client.query("i", expr=name)',
    ],
)
def test_Q2_a_query_that_is_pasted_is_seen(line: str) -> None:
    source = f"async def ask(db, client, name, query, rows):\n    return {line}\n"
    assert list(pasted(SOURCES[0], source)) == ["ask:2"]


@pytest.mark.parametrize(
    "line",
    [
        'db.execute("SELECT 1 WHERE ? = ?", (name, name))',
        'db.execute(f"SELECT {COLUMNS} FROM t WHERE name = ?", (name,))',
        'db.aql.execute("FOR d IN @@c FILTER d.x == @x RETURN d", bind_vars={"x": name})',
        'client.query("i", filter="a == {a}", filter_params={"a": name})',
    ],
)
def test_Q2_a_query_with_parameters_is_none(line: str) -> None:
    assert not list(pasted(SOURCES[0], f"def ask(db, client, name):\n    return {line}\n"))


@pytest.mark.parametrize(
    ("lines", "is_seen"),
    [
        (['by = "a" if name else "b"'], False),
        (['of, by = "a", "b"', 'if name: by = "c"'], False),
        (['for by in ("a", "b"): db.execute(by)'], False),
        (["by = name"], True),
        (['of, by = "a", name'], True),
        (['by = "a"', "if name: by = name"], True),
        (['by = "a"', "by += name"], True),
        (['by = "a"', "for by in name: db.execute(by)"], True),
    ],
)
def test_Q2_a_local_name_is_fixed_where_all_it_is_given_is(lines: list[str], is_seen: bool) -> None:
    body = "\n    ".join([*lines, 'db.execute(f"SELECT 1 {by}")'])
    assert bool(list(pasted(SOURCES[0], f"def ask(db, name):\n    {body}\n"))) == is_seen


def test_Q2_every_renderer_named_is_there() -> None:
    for file, function in RENDERERS:
        (path,) = [path for path in SOURCES if name_of(path) == file]
        names = {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
        assert function in names, f"{file} has no {function}: take it from the list"


# ── the source: nothing foreign is unpickled ────────────────────────────────────────────────────

RUN_WHAT_THEY_READ = {
    "pickle": {"load", "loads", "Unpickler"}, "cloudpickle": {"load", "loads"}, "dill": {"load", "loads"},
    "marshal": {"load", "loads"}, "shelve": {"open"}, "joblib": {"load"}, "torch": {"load"}, "pandas": {"read_pickle"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"},
    "jsonpickle": {"decode"}, "runpy": {"run_path"},
}  # fmt: skip
# Who may, and whose bytes they are.
MAY_UNPICKLE = {
    "actors/stations.py": "rows of another station of the same Ray Data job: Ray's ports are the trust boundary",
    "nexus/cache.py": "what this very process pickled into its own memory",
    "cluster/channel.py": "what a member, as the voters know them, sealed to this greeting: opened before it is read",
}


def unpickled(source: str) -> Iterator[str]:
    """Where bytes may become any object: `line: call`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in RUN_WHAT_THEY_READ:
            yield from (
                f"{node.lineno}: {node.module}.{alias.name}"
                for alias in node.names
                if alias.name in RUN_WHAT_THEY_READ[node.module]
            )
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            module, _, name = called.rpartition(".")
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in RUN_WHAT_THEY_READ.get(module, ()):
                yield f"{node.lineno}: {called}"
            elif "allow_pickle" in keywords and ast.unparse(keywords["allow_pickle"]) != "False":
                yield f"{node.lineno}: {called} with allow_pickle"
            elif called in ("eval", "exec"):
                yield f"{node.lineno}: {called}"


@pytest.mark.parametrize(
    "line",
    [
        "pickle.loads(data)", "cloudpickle.load(file)", "marshal.loads(data)", "torch.load(file)", "joblib.load(file)",
        "yaml.load(text, Loader)", "numpy.load(file, allow_pickle=True)", "np.load(file, allow_pickle=given)",
        "pickle.Unpickler(file)", "eval(text)", "pandas.read_pickle(file)",
    ],
)  # fmt: skip
def test_Q8_a_call_that_runs_what_it_reads_is_seen(line: str) -> None:
    assert list(unpickled(f"def read(data, file, text):\n    return {line}\n"))
    assert list(unpickled("from pickle import loads\n")) and not list(unpickled("yaml.safe_load(text)\n"))


def test_Q8_bytes_become_objects_only_where_said_and_there_they_still_do() -> None:
    doing = {name_of(path) for path in SOURCES if list(unpickled(path.read_text()))}
    assert doing == set(MAY_UNPICKLE)


# ── what reaches a decoder ──────────────────────────────────────────────────────────────────────


def mutants(frame: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The frame with bits flipped, cut, grown, and with pieces of it elsewhere."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(frame)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0 if place < len(data):
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    del data[place : place + rng.randint(1, 8)]
                case 2:
                    data[place:place] = rng.randbytes(rng.randint(1, 8))
                case _:
                    data[place:place] = data[: rng.randint(1, 16)]
        yield bytes(data)


def test_Q8_mutated_commands_are_read_or_refused() -> None:
    """By a catalog, as by every voter: none may crash it, and one that is refused changes nothing."""
    refused = 0
    for command in (Put("plan", b"a plan" * 8), CompareAndSet("plan", 4, b"x"), Grant(5000)):
        catalog = Catalog()
        client = decode_response(catalog.apply(1, encode(OpenSession())))
        assert client
        before = catalog.snapshot()
        for mutant in mutants(encode(command, client, 1, 1), 2000):
            catalog.restore(before)
            try:
                catalog.apply(2, mutant)
            except Unreadable:
                refused += 1
                assert catalog.snapshot() == before
    assert refused > 2000


def test_Q8_mutated_snapshots_are_refused() -> None:
    catalog = Catalog()
    client = decode_response(catalog.apply(1, encode(OpenSession())))
    assert client
    catalog.apply(2, encode(Put("plan", b"x"), client, 1, 1))
    data = catalog.snapshot()
    for mutant in mutants(data, 3000):
        with suppress(Unreadable):
            Catalog().restore(mutant)
    file = backup.write(Snapshot(2, 1, Members(frozenset()), data))
    for mutant in mutants(file, 1000):
        if mutant != file:
            with pytest.raises(NexusError):
                backup.read(mutant)


def test_Q8_mutated_plans_are_read_or_refused() -> None:
    frame = plan.encode(plan.Plan((plan.Place("embedder", 0, "sark"),)))
    for mutant in mutants(frame, 2000):
        with suppress(UpstreamInvalid):
            plan.decode(mutant)


# ── what reaches the document store over HTTP ───────────────────────────────────────────────────

HOSTILE = [
    "'", '"', "''; DROP TABLE versions; --", '" OR 1=1 --', "' UNION SELECT hash FROM keys --", "a' OR 'a'='a", "%",
    "_", "*", "NEAR(a b)", 'a" NEAR "b', "a AND", "(", ")", "col:term", "-a", "^a", "\\", "\\'", "{tenant}",
    "@@collection", ':tenant', "?", "$.\"a\"", "json_extract(metadata)", "1 || true",
    '" || true REMOVE d IN docs //', "a/*", "\u2019",
    "\uff07", "x" * 1000,
]  # fmt: skip


@pytest.fixture(scope="module")
def filled(shared_door: Door) -> tuple[Door, dict[str, str]]:
    """A door with one document of ours and one of somebody else's."""
    headers = shared_door.headers("ours")
    for who, name in ((headers, "ours.md"), (shared_door.headers("theirs"), "theirs.md")):
        body = {"filename": name, "content": "# Gripper\n\nThe gripper closes.\n", "metadata": {"robot": "HX-3"}}
        assert shared_door.client.post("/rag/add_document", json=body, headers=who).status_code == 201
    return shared_door, headers


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize(
    "place", ["query", "value", "values", "short form", "key", "nested value", "source", "as many as may be"]
)
def test_Q3_a_search_says_no_more_however_it_is_asked(
    filled: tuple[Door, dict[str, str]], place: str, text: str
) -> None:
    door, headers = filled
    filters: dict[str, object] | None = {
        "query": None, "value": {"type": "eq", "key": "robot", "value": text},
        "values": {"type": "in", "key": "robot", "value": [text, "HX-3"]}, "short form": {"robot": text},
        "key": {"type": "ne", "key": text, "value": "x"},
        "nested value": {"type": "or", "filters": [{"robot": text}, {"type": "gt", "key": "robot", "value": text}]},
        "source": {"type": "ne", "key": "source", "value": text},
        "as many as may be": {"type": "and", "filters": [{"type": "ne", "key": "robot", "value": text}] * 64},
    }[place]  # fmt: skip
    body = {"query": text if place == "query" else "gripper closes", "filters": filters}
    answer = door.client.post("/rag/search", json=body, headers=headers)
    assert answer.status_code in (200, 422), answer.text
    if answer.status_code == 422:
        assert answer.json()["errors"][0]["pointer"].startswith(("/filters", "/query"))
    else:
        assert {hit["source"] for hit in answer.json()["hits"]} <= {"ours.md"}
        if place in ("value", "short form", "nested value"):
            assert answer.json()["hits"] == [] or place == "nested value"


@pytest.mark.parametrize("text", [one for one in HOSTILE if len(one) < 100], ids=range(len(HOSTILE) - 1))
def test_Q3_names_and_cursors_are_values(filled: tuple[Door, dict[str, str]], text: str) -> None:
    door, headers = filled
    for path in ("/rag/documents", "/rag/jobs"):
        listed = door.client.get(path, params={"after": text}, headers=headers)
        assert listed.status_code in (200, 404, 422)
        assert "theirs.md" not in listed.text
    assert door.client.get("/rag/documents", params={"collection": text}, headers=headers).status_code in (200, 422)
    quoted = json.dumps(text)[1:-1].replace("/", "%2F").replace("?", "%3F").replace("#", "%23").replace("%", "%25")
    for method, path in (
        ("GET", f"/rag/documents/{quoted}"), ("DELETE", f"/rag/documents/{quoted}"), ("GET", f"/rag/jobs/{quoted}"),
        ("GET", f"/rag/deletions/{quoted}"), ("GET", f"/mcp/{quoted}/get_context"),
    ):  # fmt: skip
        answer = door.client.request(method, path, headers=headers)
        assert answer.status_code in (200, 404, 422), answer.text
        assert "theirs" not in answer.text
    assert door.client.get("/rag/documents", headers=headers).json()["documents"]


def test_Q3_what_is_stored_comes_back_as_it_was(filled: tuple[Door, dict[str, str]]) -> None:
    door, headers = filled
    for number, text in enumerate(HOSTILE):
        metadata = {"note": text}
        body = {"filename": f"{number}.md", "content": f"Note {number}", "metadata": metadata, "collection": "notes"}
        receipt = door.client.post("/rag/add_document", json=body, headers=headers).json()
        shown = door.client.get(f"/rag/documents/{receipt['document_id']}", headers=headers).json()
        assert shown["metadata"] == metadata
        asked = {"query": f"Note {number}", "collection": "notes", "k": 100, "filters": {"note": text}}
        hits = door.client.post("/rag/search", json=asked, headers=headers).json()["hits"]
        assert {hit["source"] for hit in hits} == {f"{number}.md"}
