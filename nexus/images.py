"""What a picture in a request may be: a PNG, JPEG, WebP or GIF of bearable size, shown to an engine as a `data:` URL.

An engine gets no address that it could follow, and no bytes that are not what they are said to be. Only the header
of a picture is read here: pixels are counted, never decoded.
"""

import asyncio
import base64
import re
import struct
import warnings
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from io import BytesIO

from PIL import Image as Pictures

from nexus.errors import InvalidRequest
from nexus.types import Image, Prompt

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
MOST_PICTURES = 16
MOST_BYTES = 20 * 2**20  # of one picture
MOST_BYTES_IN_ALL = 48 * 2**20  # of all pictures of a request: what its longest body could hold in base64
MOST_PIXELS = 50_000_000
MOST_FRAMES = 100
# How often a parser may read: a picture of so many bytes has fewer parts, and one made to be slow has millions.
READS_TO_OPEN = 4_000
READS_TO_VERIFY = 400_000

_HEAD = re.compile(rf"data:({'|'.join(FORMATS)});base64,", re.ASCII | re.IGNORECASE)
# What Pillow raises for a file that is broken, besides its own error, which is an OSError.
_BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError,
    AssertionError, RuntimeError, struct.error, zlib.error, UserWarning,
)  # fmt: skip

warnings.simplefilter("error", Pictures.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Picture:
    """The bytes of a picture and what they are said to be."""

    media_type: str
    content: bytes


Fetch = Callable[[str], Awaitable[Picture]]  # raises InvalidRequest for a URL that brings no picture


async def check_pictures(prompt: Prompt, fetch: Fetch) -> Prompt:
    """The prompt with each of its pictures verified and as a `data:` URL, whatever URL it had.

    Raises InvalidRequest, pointing at the picture, with the code `invalid_image`, or `url_not_allowed` of `fetch`.
    """
    places = {
        (i, j): part.url
        for i, message in enumerate(prompt.messages)
        if message.images
        for j, part in enumerate(message.content)
        if isinstance(part, Image)
    }
    if len(places) > MOST_PICTURES:
        pointer = _pointer(*list(places)[MOST_PICTURES])
        raise InvalidRequest(f"a request has at most {MOST_PICTURES} pictures", pointer=pointer, code="invalid_image")
    checked: dict[tuple[int, int], Image] = {}
    room = MOST_BYTES_IN_ALL
    for place, url in places.items():
        try:
            picture = await asyncio.to_thread(read_data_url, url) if url[:5].lower() == "data:" else await fetch(url)
            room -= len(picture.content)
            if room < 0:
                raise _invalid(f"all pictures of a request have at most {MOST_BYTES_IN_ALL // 2**20} MiB")
            await asyncio.to_thread(verify, picture)
            checked[place] = Image(await asyncio.to_thread(to_data_url, picture))
        except InvalidRequest as error:
            raise InvalidRequest(error.message, pointer=_pointer(*place), code=error.code) from None
    messages = tuple(
        replace(message, content=tuple(checked.get((i, j), part) for j, part in enumerate(message.content)))
        if message.images
        else message
        for i, message in enumerate(prompt.messages)
    )
    return replace(prompt, messages=messages)


def _pointer(message: int, part: int) -> str:
    return f"/messages/{message}/content/{part}/image_url/url"


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(why, code="invalid_image")


def read_data_url(url: str) -> Picture:
    """The bytes of `data:TYPE;base64,…`, not verified. Raises InvalidRequest for another shape, or too many bytes."""
    head = _HEAD.match(url)
    if head is None:
        raise _invalid(f"a picture's data: URL starts with data:TYPE;base64, where TYPE is one of {', '.join(FORMATS)}")
    if len(url) - head.end() > (MOST_BYTES + 2) // 3 * 4:
        raise _too_large()
    try:
        content = base64.b64decode(url[head.end() :], validate=True)
    except ValueError:
        raise _invalid("what follows the comma of a picture's data: URL is not valid base64") from None
    return Picture(head[1].lower(), content)


def to_data_url(picture: Picture) -> str:
    return f"data:{picture.media_type};base64,{base64.b64encode(picture.content).decode()}"


def verify(picture: Picture) -> None:
    """Return if the bytes are a picture of their type, as far as its header says, else raise InvalidRequest."""
    if len(picture.content) > MOST_BYTES:
        raise _too_large()
    reader = _Reader(picture.content, READS_TO_OPEN)
    try:
        with Pictures.open(reader, formats=(FORMATS[picture.media_type],)) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise _too_many_pixels()
            reader.left = READS_TO_VERIFY
            if getattr(opened, "n_frames", 1) > MOST_FRAMES:
                raise _invalid(f"an animated picture has at most {MOST_FRAMES} frames")
            opened.verify()
    except (Pictures.DecompressionBombError, Pictures.DecompressionBombWarning):
        raise _too_many_pixels() from None
    except _BROKEN:
        raise _invalid(f"the picture's bytes are not an {picture.media_type} that can be read") from None
    if width < 1 or height < 1:
        raise _invalid("the picture has no pixels")


def _too_large() -> InvalidRequest:
    return _invalid(f"a picture has at most {MOST_BYTES // 2**20} MiB; send a smaller one")


def _too_many_pixels() -> InvalidRequest:
    return _invalid(f"a picture has at most {MOST_PIXELS:,} pixels; send a smaller one")


class _Reader(BytesIO):
    """Bytes that may be read only so often, so that a file of a million tiny parts costs no more than a picture."""

    def __init__(self, content: bytes, left: int) -> None:
        super().__init__(content)
        self.left = left

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError("the picture has too many parts")
        return super().read(size)
