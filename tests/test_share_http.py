"""Blocks over HTTP: what goes in comes out, of one's own tenant, within limits, and never held whole."""

import asyncio
import json
import socket
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import Message

from deployments import cli
from deployments.gateway import build
from tests.conftest import Door, open_front, open_house

MIB = 2**20


@pytest.fixture(scope="module")
def door(shared_door: Door) -> Door:
    return shared_door


@pytest.fixture(scope="module")
def headers(door: Door) -> dict[str, str]:
    return door.headers()


def test_what_is_shared_comes_back_with_all_that_was_said_of_it(door: Door, headers: dict[str, str]) -> None:
    content, metadata = bytes(range(256)) * 20_000, {"robot_id": "r-7", "größe": [1, 2.5, None], "data_type": "scan"}
    said = {**headers, "content-type": "Image/PNG; q=1", "x-nexus-metadata": json.dumps(metadata)}
    answer = door.client.put("/share/scan-1", content=content, headers=said)
    assert answer.status_code == 201, answer.text
    told = answer.json()
    assert told["metadata"] == metadata and (told["size"], told["data_type"]) == (len(content), "scan")
    assert (told["copies"], told["wanted"], told["nodes"], told["node_id"]) == (1, 2, ["local"], "local")
    back = door.client.get("/share/scan-1", headers=headers)
    assert back.content == content
    assert back.headers["content-type"] == "image/png" and back.headers["content-length"] == str(len(content))
    assert json.loads(back.headers["x-nexus-metadata"]) == metadata
    assert back.headers["cache-control"] == "no-store" and back.headers["x-content-type-options"] == "nosniff"
    head = door.client.head("/share/scan-1", headers=headers)
    assert (head.status_code, head.content) == (200, b"")
    wanted = ("content-type", "content-length", "etag", "x-nexus-metadata", "x-nexus-data-type", "x-nexus-copies")
    assert {name: head.headers[name] for name in wanted} == {name: back.headers[name] for name in wanted}
    described = door.client.get("/share/scan-1?describe=true", headers=headers).json()
    assert described == {name: value for name, value in told.items() if name != "message"}


def test_metadata_in_a_header_is_utf8(door: Door, headers: dict[str, str]) -> None:
    said = [(name, value.encode()) for name, value in headers.items()]
    sent = [*said, ("x-nexus-metadata", '{"place": "Köln"}'.encode())]
    answer = door.client.put("/share/place", content=b"x", headers=sent)
    assert (answer.status_code, answer.json()["metadata"]) == (201, {"place": "Köln"})


def test_a_new_version_replaces_the_old_one(door: Door, headers: dict[str, str]) -> None:
    first = door.client.put("/share/again", content=b"first", headers=headers)
    second = door.client.put("/share/again", content=b"second", headers=headers)
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.json()["version"] > first.json()["version"]
    back = door.client.get("/share/again", headers=headers)
    assert back.content == b"second"
    asked = {**headers, "if-none-match": back.headers["etag"]}
    unchanged = door.client.get("/share/again", headers=asked)
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert door.client.get("/share/again", headers={**headers, "if-none-match": '"1"'}).status_code == 200


def test_what_is_deleted_is_gone_and_its_version_is_not_used_again(door: Door, headers: dict[str, str]) -> None:
    version = door.client.put("/share/gone", content=b"x", headers=headers).json()["version"]
    answer = door.client.delete("/share/gone", headers=headers)
    assert answer.json() == {"deleted": True, "data_id": "gone", "version": version, "copies": 1, "erased": 1}
    for method in ("GET", "HEAD", "DELETE"):
        assert door.client.request(method, "/share/gone", headers=headers).status_code == 404
    assert door.client.put("/share/gone", content=b"y", headers=headers).json()["version"] > version


def test_a_list_goes_page_by_page(door: Door) -> None:
    headers = door.headers("lister")
    for number in range(5):
        door.client.put(f"/share/block-{number}", content=b"x", headers=headers)
    seen: list[str] = []
    after: str | None = ""
    while after is not None:
        page = door.client.get("/share", params={"limit": 2, "after": after}, headers=headers).json()
        assert len(page["blocks"]) <= 2
        seen += [block["data_id"] for block in page["blocks"]]
        after = page["next"]
    assert seen == [f"block-{number}" for number in range(5)]


def test_another_tenant_finds_nothing_and_changes_nothing(door: Door, headers: dict[str, str]) -> None:
    strangers = door.headers("elsewhere")
    door.client.put("/share/ours", content=b"ours", headers=headers)
    for method in ("GET", "HEAD", "DELETE"):
        assert door.client.request(method, "/share/ours", headers=strangers).status_code == 404
    assert "ours" not in door.client.get("/share", headers=strangers).text
    assert door.client.put("/share/ours", content=b"theirs", headers=strangers).status_code == 201
    assert door.client.get("/share/ours", headers=strangers).content == b"theirs"
    assert door.client.delete("/share/ours", headers=strangers).status_code == 200
    assert door.client.get("/share/ours", headers=headers).content == b"ours"


@pytest.mark.parametrize("data_id", ["-a", ".hidden", "a b", "ä", "a" * 129, "a%0ab", "..%5c..%5cetc", "%00"])
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_a_bad_id_is_refused_with_a_reason(door: Door, headers: dict[str, str], method: str, data_id: str) -> None:
    content = b"x" if method == "PUT" else None
    answer = door.client.request(method, f"/share/{data_id}", content=content, headers=headers)
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/data_id")


@pytest.mark.parametrize("data_id", ["a/b", "a%2fb", "..%2f..%2fkeys", ""])
def test_what_is_no_id_at_all_leads_nowhere(door: Door, headers: dict[str, str], data_id: str) -> None:
    assert door.client.put(f"/share/{data_id}", content=b"x", headers=headers).status_code in (404, 405)


@pytest.mark.parametrize(
    "metadata",
    ["", "nonsense", "[]", "7", '"text"', "{", '{"a": NaN}', '{"a": 1e999}', '{"a": "' + "x" * 17_000 + '"}'],
)
def test_metadata_that_is_no_object_is_refused(door: Door, headers: dict[str, str], metadata: str) -> None:
    for place in ({"headers": {**headers, "x-nexus-metadata": metadata}}, {"params": {"metadata": metadata}}):
        answer = door.client.put("/share/bad", content=b"x", **{"headers": headers, **place})
        assert answer.status_code == 422 and answer.json()["errors"][0]["pointer"] == "/metadata", answer.text
    assert door.client.get("/share/bad", headers=headers).status_code == 404


def test_what_cannot_be_meant_is_refused(door: Door, headers: dict[str, str]) -> None:
    twice = {**headers, "x-nexus-metadata": "{}"}
    assert door.client.put("/share/bad?metadata={}", content=b"x", headers=twice).status_code == 422
    assert door.client.put("/share/bad?data_type=a/b", content=b"x", headers=headers).status_code == 422
    odd = {**headers, "content-type": "no media type"}
    assert door.client.put("/share/bad", content=b"x", headers=odd).status_code == 422
    nothing = door.client.put("/share/bad", headers=headers)
    assert nothing.status_code == 422 and "there is none" in nothing.json()["detail"]
    assert door.client.get("/share/bad", headers=headers).status_code == 404


def pieces(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield bytes([number % 251]) * MIB


def test_what_is_larger_than_a_block_may_be_is_refused_announced_or_not(door: Door, headers: dict[str, str]) -> None:
    announced = {**headers, "content-length": str(64 * MIB + 1)}
    for said, content in ((announced, b"x"), (headers, pieces(65))):
        answer = door.client.put("/share/too-large", content=content, headers=said)
        assert answer.status_code == 413 and "sharing.max_block_bytes" in answer.json()["detail"]
    assert door.client.get("/share/too-large", headers=headers).status_code == 404
    assert not list((door.lent.config.home / "share" / "blocks" / "drafts").iterdir())


def exchange(door: Door, method: str, headers: dict[str, str], sent: int) -> tuple[int, int]:
    """Status and size of an answer to so many pieces, of which neither side ever has more than one."""
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": "/share/large", "raw_path": b"/share/large", "root_path": "", "query_string": b"", "state": {},
        "headers": [(b"host", b"testserver"), *((name.encode(), value.encode()) for name, value in headers.items())],
        "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    body, told = pieces(sent), {"status": 0, "size": 0}

    async def receive() -> Message:
        nonlocal sent
        sent -= 1
        if sent < -1:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": next(body, b""), "more_body": sent > 0}

    async def send(message: Message) -> None:
        told["status"] = message.get("status", told["status"])
        told["size"] += len(message.get("body", b""))

    assert door.client.portal is not None
    door.client.portal.call(door.client.app, scope, receive, send)
    return told["status"], told["size"]


def test_a_block_larger_than_any_other_body_is_never_held_whole(door: Door, headers: dict[str, str]) -> None:
    exchange(door, "PUT", headers, 4)
    tracemalloc.start()
    shared = exchange(door, "PUT", headers, 48)
    read = exchange(door, "GET", headers, 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (shared[0], read) == (200, (200, 48 * MIB))
    assert most < 16 * MIB


def test_what_is_counted(door: Door, headers: dict[str, str]) -> None:
    for _ in range(3):
        door.client.put("/share/counted?data_type=counted", content=b"x", headers=headers)
    told = door.client.get("/metrics", headers=headers).text
    assert 'mcp_data_shared_total{data_type="counted",node_id="local"} 3.0' in told
    assert 'mcp_replication_duration_seconds_count{node_id="local"}' in told


def test_it_is_in_the_record_before_it_is_done(door: Door, headers: dict[str, str]) -> None:
    door.client.put("/share/recorded", content=b"x", headers=headers)
    door.client.get("/share/nowhere-to-be-found", headers=headers)
    door.lent.audit.settle()
    files = sorted(door.lent.config.home.glob("audit/*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    mine = [line for line in lines if "recorded" in str(line) and "PUT /share" in str(line)]
    assert len(mine) == 2 and "begun" in str(mine[0]) and "done" in str(mine[1])
    assert [line for line in lines if "nowhere-to-be-found" in str(line) and "denied" in str(line)]


def test_operators_see_who_keeps_what(door: Door, headers: dict[str, str]) -> None:
    door.client.put("/share/seen", content=b"x" * 1000, headers=headers)
    told = door.client.get("/sharing", headers=headers).json()
    assert told["blocks"] >= 1 and told["short"] == 0 and told["copies_wanted"] == 2
    (steward,) = told["stewards"]
    assert (steward["node"], steward["state"]) == ("local", "here") and steward["blocks"] == told["blocks"]
    assert door.client.post("/sharing/scrub", headers=headers).json() == {"damaged": 0}
    key = door.client.post("/sharing/keys", json={}, headers=headers)
    assert key.status_code == 201 and key.json()["tenant"] == "default"
    assert door.client.get("/share/seen", headers=headers).content == b"x" * 1000
    assert door.client.post("/sharing/keys", json={"tenant": "nobody"}, headers=headers).status_code == 404
    assert door.client.delete("/sharing/stewards/local", headers=headers).status_code == 409
    assert door.client.delete("/sharing/stewards/gone", headers=headers).status_code == 404


# The command line


@pytest.fixture
def nexus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run `nexus share …` against a front door of its own, on a port: exit code, what it printed and complained of."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nexus", "share", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    (tmp_path / "home").mkdir(mode=0o700)
    with open_house() as house, open_front(house, tmp_path / "home") as lent, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(build(lent), lifespan="off", log_config=None))
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        serving.start()
        monkeypatch.setenv("NEXUS_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("NEXUS_API_KEY", lent.keys.create("operator")[0])
        monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "elsewhere"))
        yield run
        server.should_exit = True
        serving.join()


def test_a_file_goes_there_and_back_by_the_command_line(
    nexus: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    assert nexus("status")[1].startswith("  shared       0 blocks, 0.0 MiB, 2 copies wanted\n")
    sent, back = tmp_path / "scan.bin", tmp_path / "back.bin"
    sent.write_bytes(bytes(range(256)) * 10_000)
    code, out, _ = nexus("put", sent, "--metadata", '{"robot_id": "r7"}', "--media-type", "image/png", "--json")
    told = json.loads(out)
    assert (code, told["data_id"], told["metadata"]) == (0, "scan.bin", {"robot_id": "r7"})
    assert nexus("get", "scan.bin", back)[0] == 0 and back.read_bytes() == sent.read_bytes()
    assert "scan.bin: version" in nexus("list")[1] and "1 of 2 copies (local)" in nexus("list")[1]
    assert [block["media_type"] for block in json.loads(nexus("list", "--json")[1])] == ["image/png"]
    assert "local        here, 1 copies" in nexus("status")[1]
    assert nexus("scrub")[1] == "0 copies were damaged\n"
    assert nexus("rotate")[1].startswith("the blocks of default are sealed under key ")
    assert nexus("rotate", "--cluster-key")[1].startswith("the cluster key is ")
    assert nexus("delete", "scan.bin")[1] == "deleted scan.bin: 1 of 1 copies are erased\n"
    assert nexus("list")[1] == ""


def test_the_command_line_takes_names_and_metadata_as_they_are(
    nexus: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    for name in ("report", "report#1", "report?x"):
        (tmp_path / name).write_text(name)
    assert nexus("put", tmp_path / "report")[0] == 0
    for name in ("report#1", "report?x"):
        assert "a data_id is" in nexus("put", tmp_path / name)[2] and nexus("delete", name)[0] == 1
    (tmp_path / "report.new").write_text("somebody's own")
    assert nexus("get", "report", tmp_path / "report")[0] == 0
    assert (tmp_path / "report.new").read_text() == "somebody's own" and (tmp_path / "report").read_text() == "report"
    _, out, _ = nexus("put", tmp_path / "report", "--id", "b", "--metadata", '{"place": "Köln"}', "--json")
    assert json.loads(out)["metadata"] == {"place": "Köln"}


def test_what_the_command_line_cannot_do_it_says_in_a_line(
    nexus: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    kept = tmp_path / "kept.bin"
    kept.write_bytes(b"kept")
    for arguments, words in (
        (("get", "nowhere", kept), "no such block"),
        (("get", "nowhere", tmp_path / "no" / "folder"), "cannot be written"),
        (("put", tmp_path / "nowhere"), "cannot be read"),
        (("put", kept, "--id", "-x"), "data_id"),
        (("put", kept, "--metadata", "[]"), "JSON object"),
        (("delete", "nowhere"), "no such block"),
        (("rotate", "--cluster-key", "--tenant", "acme"), "give --tenant or --cluster-key"),
        (("forget", "nowhere"), "no steward is called"),
        (("expel", "nowhere"), "no machine 'nowhere' was ever here"),
        (("expel", "local"), "local cannot expel itself"),
    ):
        code, _, complaint = nexus(*arguments)
        assert (code, words in complaint, "Traceback" in complaint) == (1, True, False), (arguments, complaint)
    assert kept.read_bytes() == b"kept" and sorted(tmp_path.glob(".*.part")) == []
