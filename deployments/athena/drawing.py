"""A cluster as a picture: machines, who holds how much of which GPU, replicas and their queues, the coordinator.

SVG that Streamlit shows as a picture, in which nothing runs and nothing is loaded; names are text in it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from deployments.athena.text import plain

WIDTH, GAP, PADDING = 1040, 20, 16
ROW, BAR, HEAD = 30, 14, 68
INK, SOFT, LINE, PAPER = "#1f2a30", "#5b6970", "#dfe4e1", "#ffffff"
FREE, TAKEN = "#e9edea", "#a9b3b0"
OWNERS = ("#1e6658", "#d08a3c", "#5b7f95", "#9a6a8e", "#8aa05a", "#3c8fa0")
WELL, BUSY, UNWELL = "#2f8f6f", "#d08a3c", "#b4411f"
STATES = {"HEALTHY": WELL, "UPDATING": BUSY, "UPSCALING": BUSY, "DOWNSCALING": BUSY}
FONT = "system-ui, 'DejaVu Sans', sans-serif"

Seen = Mapping[str, Any]


def draw(state: Seen) -> str:
    """The picture of what `GET /status` answers."""
    nodes = state["nodes"] or []
    colors = _colors(nodes)
    per_row = min(3, max(1, len(nodes)))
    width = (WIDTH - (per_row - 1) * GAP) // per_row
    pieces: list[str] = []
    top = 0
    for start in range(0, len(nodes), per_row):
        row = nodes[start : start + per_row]
        cards = [_card(node, _replicas_of(node, nodes, state), state, colors, width) for node in row]
        height = max(height for _, height in cards)
        for place, (inner, _) in enumerate(cards):
            frame = _box(0, 0, width, height, PAPER, LINE, 10)
            pieces.append(f'<g transform="translate({place * (width + GAP)} {top})">{frame}{inner}</g>')
        top += height + GAP
    for part, height in (_legend(colors), _coordinator(state["coordinator"])):
        if part:
            pieces.append(f'<g transform="translate(0 {top})">{part}</g>')
            top += height
    return _picture("".join(pieces), top)


def draw_models(report: Seen) -> str:
    """The picture of how the models do, as `GET /report` answers: what each works on, how fast and how well."""
    models = report["models"]
    most = max([1.0, *(one["tokens_per_second"] or 0.0 for one in models)])
    heads = ((0, "Model"), (330, "Working on"), (440, "First token"), (560, "Tokens a second"), (820, "Answered"))
    pieces = [_text(x, 14, name, SOFT, 12, 600) for x, name in heads]
    for number, one in enumerate(models):
        y = 30 + number * ROW
        name = f"{one['name']} @ {one['place']}" if one["place"] else one["name"]
        first = one["first_token_seconds"]
        speed = one["tokens_per_second"]
        ejected = one["ejected_seconds"] is not None
        pieces += [
            _dot(6, y + 8, UNWELL if ejected else WELL), _text(20, y + 12, _short(name, 38), INK, 13.5),
            _text(330, y + 12, one["in_flight"], INK, 13.5),
            _text(440, y + 12, "–" if first is None else f"{first * 1000:.0f} ms", INK, 13.5),
            _box(560, y + 1, 180, BAR, FREE, None, 4),
            "" if speed is None else _box(560, y + 1, max(2, 180 * speed / most), BAR, OWNERS[0], None, 4),
            _text(748, y + 12, "–" if speed is None else f"{speed:.0f}", INK, 13.5),
            _text(820, y + 12, _answered(one), INK, 13.5),
        ]  # fmt: skip
    return _picture("".join(pieces), 34 + len(models) * ROW)


def _answered(one: Seen) -> str:
    if not one["requests"]:
        return "nothing was asked"
    return f"{one['requests'] - one['failures']} of {one['requests']} ({one['success_rate']:.0%} of late)"


# ── a machine ───────────────────────────────────────────────────────────────────────────────────


def _card(node: Seen, replicas: Sequence[Seen], state: Seen, colors: Mapping[str, str], width: int) -> tuple[str, int]:
    """What is in the frame of a machine, and how high that is."""
    inner = width - 2 * PADDING
    is_drained = node["name"] in (state["drained"] or ())
    said = "does not answer" if not node["alive"] else "drained" if is_drained else ""
    about = f"{node['address']} · {node['cpus']:g} CPUs · {gibibytes(node['memory_bytes'])}"
    color = UNWELL if not node["alive"] else BUSY if is_drained else WELL
    pieces = [
        _dot(PADDING + 5, 24, color), _text(PADDING + 18, 29, _short(node["name"], 24), INK, 16, 600),
        _text(width - PADDING, 29, said, color, 12.5, 600, "end"), _text(PADDING, 50, _short(about, 46), SOFT, 12.5),
    ]  # fmt: skip
    y = HEAD
    for gpu in node["gpus"] or ():
        pieces += _gpu(gpu, PADDING, y, inner, colors)
        y += 2 * BAR + 22
    if node["gpus"] is None and node["alive"]:
        pieces.append(_text(PADDING, y + 12, "does not say which GPUs it has", SOFT, 12.5))
        y += ROW
    if replicas:
        pieces.append(f'<line x1="{PADDING}" x2="{width - PADDING}" y1="{y + 2}" y2="{y + 2}" stroke="{LINE}"/>')
        y += 12
    for one in replicas:
        pieces += _replica(one, y, width)
        y += ROW
    return "".join(pieces), y + 8


def _gpu(gpu: Seen, x: int, y: int, width: int, colors: Mapping[str, str]) -> Iterator[str]:
    """A bar as wide as its memory: what each holds or is to have of it, what others hold, and what is free."""
    memory = max(1, gpu["memory_bytes"])
    parts = [(one["bytes"], colors[owner], owner) for owner, one in _owned(gpu)]
    parts.append((gpu["taken_bytes"], TAKEN, "others"))
    used = sum(part[0] for part in parts)
    yield _text(x, y + 11, _short(f"GPU {gpu['index']}  {gpu['model']}", 26), INK, 13)
    yield _text(x + width, y + 11, f"{gibibytes(used)} of {gibibytes(memory)}", SOFT, 12.5, anchor="end")
    yield _box(x, y + 18, width, BAR, FREE, None, 4)
    at = float(x)
    for size, color, owner in parts:
        share = min(width * size / memory, x + width - at)
        if share > 0:
            yield f"<g>{_box(at, y + 18, share, BAR, color, None, 3)}<title>{_escaped(owner)}</title></g>"
            at += share


def _owned(gpu: Seen) -> list[tuple[str, Seen]]:
    """Who has memory of a GPU: those who hold some, else those for whom some is planned."""
    if gpu["claims"]:
        return [(_owner(one["holder"]), one) for one in gpu["claims"]]
    return [(one["deployment"], one) for one in gpu["planned"]]


def _owner(holder: str) -> str:
    return holder.partition("#")[0].partition("@")[0]


def _replica(one: Seen, y: int, width: int) -> Iterator[str]:
    """A deployment on a machine: how it is, how many replicas run, what they work on and what waits."""
    running, starting = one["replicas"]["running"], one["replicas"]["starting"]
    name = one["name"].partition("@")[0]
    yield _dot(PADDING + 5, y + 9, STATES.get(one["status"], UNWELL))
    yield _text(PADDING + 18, y + 13, _short(f"{name} · {one['model']}" if one["model"] else name, 24), INK, 13)
    squares = min(running + starting, 8)
    for place in range(squares):
        color = WELL if place < running else FREE
        yield _box(width - PADDING - 13 * (squares - place), y + 3, 10, 11, color, None, 2)
    if "ongoing" in one:
        said = f"{one['ongoing']} at work, {one['queued']} waiting"
        yield _text(width - PADDING - 13 * squares - 8, y + 13, said, BUSY if one["queued"] else SOFT, 12, anchor="end")


def _replicas_of(node: Seen, nodes: Sequence[Seen], state: Seen) -> list[Seen]:
    """The deployments that are pinned to a machine; on a machine alone, all."""
    is_alone = len(nodes) == 1
    return [one for one in state["deployments"] or () if one["node"] == node["name"] or (is_alone and not one["node"])]


def _colors(nodes: Iterable[Seen]) -> dict[str, str]:
    owners = dict.fromkeys(owner for node in nodes for gpu in node["gpus"] or () for owner, _ in _owned(gpu))
    return {owner: OWNERS[number % len(OWNERS)] for number, owner in enumerate(owners)}


def _legend(colors: Mapping[str, str]) -> tuple[str, int]:
    if not colors:
        return "", 0
    pieces, x = [], 0
    for owner, color in [*colors.items(), ("held by others", TAKEN), ("free", FREE)]:
        said = _short(owner, 26)
        pieces += [_box(x, 4, 12, 12, color, None, 3), _text(x + 18, 14, said, SOFT, 12.5)]
        x += 42 + 7 * len(said)
    return "".join(pieces), 40


# ── the coordinator ─────────────────────────────────────────────────────────────────────────────


def _coordinator(told: Seen | None) -> tuple[str, int]:
    """The voters in a row, the leader marked, each with how far behind it is."""
    if told is None:
        return "", 0
    pieces = [_text(-30, 14, "Coordinator", INK, 15, 600)]
    for place, one in enumerate(told["voters"]):
        x = 18 + place * 170
        is_leader, is_away = one["role"] == "leader", one["role"] == "absent"
        color = UNWELL if is_away else WELL if is_leader else "#8fb8ab"
        if place:
            pieces.append(f'<line x1="{x - 150}" x2="{x - 20}" y1="50" y2="50" stroke="{LINE}" stroke-width="2"/>')
        said = "away" if is_away else f"{one['role']}, term {one['term']}"
        behind = "" if is_away or not one["lag"] else f"{one['lag']} behind"
        pieces += [
            f'<circle cx="{x}" cy="50" r="{19 if is_leader else 16}" fill="{color}"/>',
            _text(x, 55, one["id"], PAPER, 14, 600, "middle"), _text(x, 86, said, SOFT, 12, anchor="middle"),
            _text(x, 101, behind, BUSY, 12, anchor="middle"),
        ]  # fmt: skip
    return f'<g transform="translate(30 0)">{"".join(pieces)}</g>', 110


# ── strokes ─────────────────────────────────────────────────────────────────────────────────────


def _picture(inner: str, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-1 -1 {WIDTH + 2} {height + 2}" width="{WIDTH}"'
        f' font-family="{FONT}">{inner}</svg>'
    )


def _box(x: float, y: float, width: float, height: float, fill: str, stroke: str | None, radius: float) -> str:
    line = f' stroke="{stroke}"' if stroke else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="{radius}" fill="{fill}"{line}/>'


def _dot(x: float, y: float, color: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="5" fill="{color}"/>'


def _text(x: float, y: float, said: object, color: str, size: float, weight: int = 400, anchor: str = "start") -> str:
    style = f'fill="{color}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style}>{_escaped(str(said))}</text>'


def _escaped(text: str) -> str:
    return escape(plain(text).replace("\n", " "))


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.0f} GiB" if count >= 10 * 2**30 else f"{count / 2**30:.1f} GiB"
