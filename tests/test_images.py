"""Pictures in chat requests: what they may be, and which of them an engine gets to see."""

import asyncio
import base64
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image as Pictures
from starlette.testclient import TestClient

from deployments.gateway import build
from nexus import images
from nexus.balancer import Balancer, Member, Weights
from nexus.cache import ResponseCache
from nexus.errors import InvalidRequest
from nexus.images import Picture, check_pictures, read_data_url, to_data_url, verify
from nexus.types import Delta, Image, Message, Prompt
from tests.conftest import Door
from tests.poison import Poison, poisons
from tests.test_gateway import check_openai_error

ROOT = Path(__file__).parent.parent
TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")


def draw(kind: str, frames: int = 1, **options: object) -> bytes:
    """A picture of noise, so that it does not compress to nothing."""
    noise = random.Random(7)
    drawn = [Pictures.frombytes("RGB", (24, 16), noise.randbytes(24 * 16 * 3)) for _ in range(frames)]
    written = BytesIO()
    more = {"save_all": True, "append_images": drawn[1:]} if frames > 1 else {}
    drawn[0].save(written, kind, **more, **options)
    return written.getvalue()


REAL = {
    "png": Picture("image/png", draw("PNG")),
    "animated png": Picture("image/png", draw("PNG", 3)),
    "jpeg": Picture("image/jpeg", draw("JPEG", comment=b"hello")),
    "progressive jpeg": Picture(
        "image/jpeg", draw("JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08" + bytes(6))
    ),
    "jpeg of two": Picture("image/jpeg", draw("MPO", 2)),
    "webp": Picture("image/webp", draw("WEBP")),
    "lossless webp": Picture("image/webp", draw("WEBP", lossless=True)),
    "animated webp": Picture("image/webp", draw("WEBP", 3)),
    "gif": Picture("image/gif", draw("GIF")),
    "animated gif": Picture("image/gif", draw("GIF", 100)),
}
PNG = REAL["png"]


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + png_chunk(b"IEND", b"")


def webp_of(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    still = REAL["lossless webp"].content[12:]
    return b"RIFF" + struct.pack("<I", 22 + len(still)) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size + still


def gif_of(width: int, height: int, body: bytes) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + bytes(3) + body + b";"


def gif_frame(blocks: bytes) -> bytes:
    return b"," + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02" + blocks + b"\0"


def jpeg_of(width: int, height: int, before: bytes = b"") -> bytes:
    frame = b"\xff\xc0\0\x0b\x08" + struct.pack(">HH", height, width) + b"\x01\x01\x11\0"
    return b"\xff\xd8" + before + frame + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0\0\xff\xd9"


FRAME = gif_frame(b"\x02\x44\x01")
LARGE = images.MOST_BYTES


def bombs() -> dict[str, Picture]:
    """Small or not, each would cost much to whoever decoded it, or read it to its end."""
    tiny = b"\x01a" * (LARGE // 2 - 99)
    return {
        "png of 50,005,000 pixels": Picture("image/png", png_of(10_001, 5_000)),
        "png of 100 million pixels": Picture("image/png", png_of(10_000, 10_000)),
        "png of 4 billion pixels": Picture("image/png", png_of(65_535, 65_535)),
        "webp of 268 million pixels": Picture("image/webp", webp_of(16_384, 16_384)),
        "gif of 4 billion pixels": Picture("image/gif", gif_of(65_535, 65_535, FRAME)),
        "jpeg of 4 billion pixels": Picture("image/jpeg", jpeg_of(65_500, 65_500)),
        "gif of 101 frames": Picture("image/gif", gif_of(1, 1, FRAME * 101)),
        "webp of 101 frames": Picture("image/webp", draw("WEBP", 101)),
        "gif of a million frames": Picture("image/gif", gif_of(1, 1, FRAME * 1_100_000)),
        "gif of a long comment": Picture("image/gif", gif_of(1, 1, b"!\xfe" + tiny + b"\0" + FRAME)),
        "gif of tiny blocks": Picture("image/gif", gif_of(1, 1, FRAME + gif_frame(tiny) + FRAME)),
        "jpeg of five million comments": Picture("image/jpeg", jpeg_of(1, 1, b"\xff\xfe\0\x02" * (LARGE // 4 - 99))),
        "jpeg of padding": Picture("image/jpeg", jpeg_of(1, 1, b"\xff" * (LARGE - 99))),
        "png of a million chunks": Picture("image/png", png_of(1, 1, png_chunk(b"teXt", b"") * (LARGE // 12 - 99))),
        "png of a million chunks at its end": Picture(
            "image/png", png_of(1, 1)[:-12] + png_chunk(b"prVt", b"") * (LARGE // 12 - 99) + png_chunk(b"IEND", b"")
        ),
        "png of text of a gigabyte": Picture(
            "image/png", png_of(1, 1, *[png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26), 9))] * 16)
        ),
    }


NONE = {
    "nothing": Picture("image/png", b""),
    "text": Picture("image/png", b"<html></html>"),
    "a signature": Picture("image/png", b"\x89PNG\r\n\x1a\n"),
    "a tiff": Picture("image/png", draw("TIFF")),
    "a bmp": Picture("image/gif", draw("BMP")),
    "postscript": Picture("image/jpeg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"),
    "an svg": Picture("image/png", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
    "half a png": Picture("image/png", PNG.content[: len(PNG.content) // 2]),
    "a png with a wrong sum": Picture("image/png", PNG.content[:-20] + b"\0\0\0\0" + PNG.content[-16:]),
    "half a webp": Picture("image/webp", REAL["webp"].content[:200]),
    "a gif without a frame": Picture("image/gif", gif_of(1, 1, b"")),
    "a jpeg without a frame": Picture("image/jpeg", b"\xff\xd8\xff\xe0\0\x02\xff\xd9"),
    "a png without width": Picture("image/png", png_of(0, 5)),
    "a jpeg without height": Picture("image/jpeg", jpeg_of(5, 0)),
    "a byte too many": Picture("image/png", PNG.content + bytes(LARGE + 1 - len(PNG.content))),
}  # fmt: skip


def refusal_of(picture: Picture) -> InvalidRequest | None:
    try:
        verify(picture)
    except InvalidRequest as refusal:
        assert refusal.code == "invalid_image"
        return refusal
    return None


# One picture


@pytest.mark.parametrize("name", REAL)
def test_a_real_picture_is_taken_as_what_it_is_and_as_nothing_else(name: str) -> None:
    content = REAL[name].content
    taken = [media_type for media_type in TYPES if refusal_of(Picture(media_type, content)) is None]
    assert taken == [REAL[name].media_type]


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_picture_is_refused(name: str) -> None:
    assert refusal_of(NONE[name]) is not None


def test_the_limits_are_reached_before_they_are_passed() -> None:
    assert refusal_of(Picture("image/png", png_of(10_000, 5_000))) is None
    assert refusal_of(Picture("image/png", PNG.content + bytes(LARGE - len(PNG.content)))) is None
    assert refusal_of(Picture("image/gif", gif_of(1, 1, FRAME * 100))) is None
    comments = jpeg_of(1, 1, (b"\xff\xfe\xff\xff" + bytes(65_533)) * 300)
    assert refusal_of(Picture("image/jpeg", comments)) is None
    chunks = png_of(1, 1)[:-12] + png_chunk(b"IDAT", bytes(4096)) * 5000 + png_chunk(b"IEND", b"")
    assert refusal_of(Picture("image/png", chunks)) is None
    blocks = gif_frame(b"\xff" + bytes(255))
    assert refusal_of(Picture("image/gif", gif_of(1, 1, FRAME + blocks[:-1] + (b"\xff" + bytes(255)) * 80_000))) is None


def test_bombs_are_refused_within_little_memory_and_time() -> None:
    """In a process of its own, which may not grow by more than a few times what the largest of them holds."""
    program = """
import resource
from nexus import images
from tests.test_images import REAL, bombs, refusal_of
made = bombs()
for picture in REAL.values():
    refusal_of(picture)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 150 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for name, picture in made.items():
    print(name, "taken" if refusal_of(picture) is None else "refused", sep=": ")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=200, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name}: refused" for name in bombs()]


MUTATIONS = some.lists(
    some.one_of(
        some.tuples(some.just("set"), some.integers(0, 4000), some.integers(0, 255)),
        some.tuples(some.just("cut"), some.integers(0, 4000), some.integers(0, 200)),
        some.tuples(some.just("repeat"), some.integers(0, 4000), some.integers(0, 200)),
        some.tuples(some.just("set"), some.integers(0, 60), some.sampled_from([0, 1, 127, 128, 254, 255])),
    ),
    max_size=6,
)


@settings(max_examples=1500, deadline=None)
@given(name=some.sampled_from(sorted(REAL)), mutations=MUTATIONS)
def test_whatever_is_done_to_a_picture_it_is_taken_or_refused(name: str, mutations: list) -> None:
    content = bytearray(REAL[name].content)
    for kind, place, value in mutations:
        place %= max(len(content), 1)
        if kind == "set":
            content[place : place + 1] = bytes([value])
        elif kind == "cut":
            del content[place : place + value]
        else:
            content[place:place] = content[place : place + value] * 3
    refusal_of(Picture(REAL[name].media_type, bytes(content)))


# data: URLs

SPELLED = base64.b64encode(PNG.content).decode()


def test_a_data_url_is_its_bytes() -> None:
    assert read_data_url(to_data_url(PNG)) == PNG
    assert read_data_url(f"DATA:Image/PNG;Base64,{SPELLED}") == PNG


@pytest.mark.parametrize(
    "url",
    [
        "data:", "data:,", "data:image/png", "data:;base64,AAAA", "data:image/png,AAAA", "data:image/png;base64",
        "data:image/png;charset=utf-8;base64,AAAA", "data:image/png;base64;base64,AAAA", "data: image/png;base64,AAAA",
        "data:image/svg+xml;base64,AAAA", "data:image/tiff;base64,AAAA", "data:image/*;base64,AAAA",
        "data:text/html;base64,AAAA", "data:application/pdf;base64,AAAA", "data:image/gıf;base64,AAAA",
        "data:image/png;baſe64,AAAA", "data:image/png;base64,AAA", "data:image/png;base64,AA=A",
        "data:image/png;base64,AA==AA==", "data:image/png;base64,AAAA\n", "data:image/png;base64, AAAA",
        "data:image/png;base64,AA%3D%3D", "data:image/png;base64,__--", "data:image/png;base64,ÄAAA",
        "data:image/png;base64,\ud800AAA", "data:image/png;base64,AAAA#x", "data:image/png;base64,=AAA",
    ],
)  # fmt: skip
def test_other_data_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        read_data_url(url)
    assert raised.value.code == "invalid_image"
    assert len(raised.value.message) < 300


def test_a_data_url_that_is_too_long_is_not_decoded() -> None:
    assert len(read_data_url("data:image/png;base64," + "A" * (LARGE // 3 * 4)).content) == LARGE // 3 * 3
    with pytest.raises(InvalidRequest, match="20 MiB"):
        read_data_url("data:image/png;base64," + "!" * (LARGE // 3 * 4 + 5))


# All pictures of a request


async def never(url: str) -> Picture:
    raise AssertionError(f"{url[:50]!r} was fetched")


def show(*parts: str | Image) -> Prompt:
    return Prompt((Message("system", "Be brief."), Message("user", parts)), "what?", tenant="acme", seed=3)


def test_pictures_stay_where_they_are_as_data_urls() -> None:
    async def fetch(url: str) -> Picture:
        return {"https://a.example/1": REAL["gif"], "https://a.example/2": REAL["jpeg"]}[url]

    here, there, further = Image(to_data_url(PNG)), Image("https://a.example/1"), Image("https://a.example/2")
    checked = asyncio.run(check_pictures(show("first", there, here, "then", further), fetch))
    gif, jpeg = Image(to_data_url(REAL["gif"])), Image(to_data_url(REAL["jpeg"]))
    assert checked == show("first", gif, here, "then", jpeg)


def test_a_prompt_without_pictures_is_left_as_it_is() -> None:
    assert asyncio.run(check_pictures(show("first", "data:,"), never)) == show("first", "data:,")


def test_a_refusal_points_at_its_picture() -> None:
    for bad in (Image("data:image/png;base64,AAAA"), Image("data:")):
        with pytest.raises(InvalidRequest) as raised:
            asyncio.run(check_pictures(show("a", Image(to_data_url(PNG)), "b", bad), never))
        assert raised.value.pointer == "/messages/1/content/3/image_url/url"


def test_what_is_fetched_is_verified_too() -> None:
    async def fetch(url: str) -> Picture:
        return Picture("image/png", REAL["gif"].content)

    with pytest.raises(InvalidRequest) as raised:
        asyncio.run(check_pictures(show(Image("https://a.example/")), fetch))
    assert (raised.value.code, raised.value.pointer) == ("invalid_image", "/messages/1/content/0/image_url/url")


def test_a_request_has_so_many_pictures_and_no_more() -> None:
    picture = Image(to_data_url(PNG))
    assert asyncio.run(check_pictures(show(*[picture] * 16), never)) == show(*[picture] * 16)
    with pytest.raises(InvalidRequest) as raised:
        asyncio.run(check_pictures(show(*[Image("https://a.example/")] * 17), never))
    assert (raised.value.code, raised.value.pointer) == ("invalid_image", "/messages/1/content/16/image_url/url")


def test_all_pictures_together_have_a_limit() -> None:
    asked = 0

    async def fetch(url: str) -> Picture:
        nonlocal asked
        asked += 1
        return Picture("image/png", PNG.content + bytes(16 * 2**20 - len(PNG.content)))

    asyncio.run(check_pictures(show(*[Image("https://a.example/")] * 3), fetch))
    asked = 0
    with pytest.raises(InvalidRequest, match="48 MiB") as raised:
        asyncio.run(check_pictures(show(*[Image("https://a.example/")] * 6), fetch))
    assert raised.value.code == "invalid_image" and asked == 4


# Through the front door


class Seer:
    """A generator that keeps what it was asked."""

    def __init__(self, name: str, sees_images: bool) -> None:
        self.name, self.sees_images = name, sees_images
        self.asked: list[Prompt] = []

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Delta]:
        self.asked.append(prompt)
        yield Delta(f"{self.name} answers", finish_reason="stop")

    async def check(self) -> None: ...


class Gallery:
    """A door before a model that sees pictures and one that does not."""

    def __init__(self, door: Door) -> None:
        self.seer, self.blind = Seer("seer", True), Seer("blind", False)
        # What it asks for is sent first to the blind one, by its order and its accuracy.
        members = [Member(self.blind, 1.0), Member(self.seer, 0.1)]
        self.fetched: list[str] = []
        balancer = Balancer(members, Weights(1, 1, 1), probe_seconds=5)
        cache = ResponseCache(10, 60, 2**20)
        self.lent = replace(door.lent, balancer=balancer, fetch_picture=self.fetch, cache=cache)
        self.default = replace(door.lent, balancer=balancer)
        self.headers = door.headers()

    async def fetch(self, url: str) -> Picture:
        self.fetched.append(url)
        return REAL["webp"]

    def ask(self, model: str, *urls: str, lent: object = None, **fields: object) -> object:
        parts = [{"type": "text", "text": "What are these?"}]
        parts += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        parts.append({"type": "text", "text": "Be brief."})
        body = {"model": model, "messages": [{"role": "user", "content": parts}], **fields}
        client = TestClient(build(lent or self.lent), raise_server_exceptions=False)
        return client.post("/v1/chat/completions", json=body, headers=self.headers)


@pytest.fixture
def gallery(door: Door) -> Gallery:
    return Gallery(door)


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_gets_the_pictures_in_order_as_data_urls(gallery: Gallery, stream: bool) -> None:
    answer = gallery.ask("seer", to_data_url(PNG), "https://a.example/w", to_data_url(REAL["gif"]), stream=stream)
    assert answer.status_code == 200, answer.text
    assert "seer answers" in answer.text
    (prompt,) = gallery.seer.asked
    pictures = [Image(to_data_url(REAL[name])) for name in ("png", "webp", "gif")]
    assert prompt.messages == (Message("user", ("What are these?", *pictures, "Be brief.")),)
    assert gallery.fetched == ["https://a.example/w"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_sees_none_refuses_pictures_that_nobody_fetched(gallery: Gallery, stream: bool) -> None:
    for model in ("blind", "nexus-rag"):
        answer = gallery.ask(model, "https://a.example/w", to_data_url(PNG), stream=stream)
        error = check_openai_error(answer, 400, "invalid_request_error")
        assert error["code"] == "images_not_supported"
    assert gallery.fetched == [] and gallery.blind.asked == []


def test_auto_goes_to_who_sees(gallery: Gallery) -> None:
    for _ in range(3):
        answer = gallery.ask("auto", to_data_url(PNG), accuracy_weight=1, latency_weight=0, throughput_weight=0)
        assert answer.json()["choices"][0]["message"]["content"] == "seer answers"
    assert gallery.blind.asked == []
    assert "blind answers" in gallery.ask("auto", accuracy_weight=1, latency_weight=0, throughput_weight=0).text


def test_a_broken_picture_reaches_no_model(gallery: Gallery) -> None:
    for stream in (False, True):
        answer = gallery.ask("seer", to_data_url(PNG), "data:image/png;base64,AAAA", stream=stream)
        error = check_openai_error(answer, 400, "invalid_request_error")
        assert (error["code"], error["param"]) == ("invalid_image", "messages.0.content.2.image_url.url")
    assert gallery.seer.asked == []


PICTURES = [one for one in poisons("seer") if one.name.startswith("a picture") and "sees none" not in one.name]


@pytest.mark.parametrize("poison", PICTURES, ids=[poison.name for poison in PICTURES])
def test_poisoned_pictures_reach_no_model(gallery: Gallery, poison: Poison) -> None:
    client = TestClient(build(gallery.default), raise_server_exceptions=False)
    answer = client.post(poison.path, content=poison.content, headers={**gallery.headers, **poison.headers})
    error = check_openai_error(answer, 400, "invalid_request_error")
    assert error["code"] in ("invalid_image", "url_not_allowed", "invalid_request")
    assert gallery.seer.asked == []


def test_a_url_is_not_allowed_by_default(gallery: Gallery) -> None:
    answer = gallery.ask("seer", "https://a.example/w" + "x" * 100, lent=gallery.default)
    error = check_openai_error(answer, 400, "invalid_request_error")
    assert (error["code"], error["param"]) == ("url_not_allowed", "messages.0.content.1.image_url.url")
    assert "x" * 51 not in answer.text and gallery.seer.asked == []
