"""Draws the rooms of `docs/architecture.md` and the imports between them: `python docs/generate_rooms.py`.

The page lists the rooms of a package from top to bottom, in a block behind a comment `rooms: …`. An import
may only go down: tests/test_imports.py compares the page, and the drawings, with every import statement.
"""

import ast
import re
from pathlib import Path

import networkx

ROOT = Path(__file__).parents[1]
PAGE, ASSETS = ROOT / "docs" / "architecture.md", ROOT / "docs" / "assets"
_BLOCK = re.compile(r"<!-- rooms: (\w+) -->\n+```\n(.*?)```", re.S)
_LINE, _BOX, _LEFT = 30, 22, 190
_COLORS = ("#4269d0", "#3ca951", "#ff725c", "#6cc5b0", "#9c6b4e", "#a463f2", "#97bbf5")


def listed(page: str) -> dict[str, list[str]]:
    """The rooms of every package, from top to bottom, as the page names them."""
    return {
        package: [line.split()[0].rstrip("/") for line in block.splitlines() if line[:1].strip()]
        for package, block in _BLOCK.findall(page)
    }


def arrows(package: str) -> set[tuple[str, str]]:
    """Who imports whom, by room: a folder or a loose module of the package."""
    found = set()
    for path in sorted((ROOT / package).rglob("*.py")):
        own = dotted(path)
        for module in imported(path, own):
            room, other = _room(package, ".".join(own)), _room(package, module)
            if room and other and room != other:
                found.add((room, other))
    return found


def wrong(order: list[str], found: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Arrows that do not go down, or from or to a room that is not listed."""
    place = {room: number for number, room in enumerate(order)}
    return sorted(
        (room, other)
        for room, other in found
        if room not in place or other not in place or place[room] >= place[other]
    )


def drawing(order: list[str], found: set[tuple[str, str]]) -> str:
    """An SVG of the rooms, one below the other, and of the imports that no chain of others implies."""
    direct = networkx.transitive_reduction(networkx.DiGraph(sorted(found)))
    place = {room: number for number, room in enumerate(order)}
    width = _LEFT + _LINE * len(order) // 2 + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_LINE * len(order)}" '
        'font-family="sans-serif" font-size="13" fill="none">'
    ]
    for room, other in sorted(direct.edges, key=lambda edge: (place[edge[0]], place[edge[1]])):
        top, bottom = (place[end] * _LINE + _LINE // 2 for end in (room, other))
        radius, color = (bottom - top) // 2, _COLORS[place[room] % len(_COLORS)]
        lines.append(
            f'<path d="M{_LEFT} {top} A{radius} {radius} 0 0 1 {_LEFT} {bottom}" stroke="{color}"/>'
            f'<path d="M{_LEFT} {bottom} l7 -6 m-7 6 l8 1" stroke="{color}"/>'
        )
    for room, number in place.items():
        top = number * _LINE + (_LINE - _BOX) // 2
        lines.append(
            f'<rect x="1" y="{top}" width="{_LEFT - 2}" height="{_BOX}" rx="4" fill="#f4f4f4" stroke="#888"/>'
            f'<text x="10" y="{top + 16}" fill="#222">{room}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def dotted(path: Path) -> list[str]:
    """The parts of a module's name."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return parts if parts[0] == "edgepeft" else ["edgepeft", *parts]


def imported(path: Path, own: list[str]) -> set[str]:
    """Modules of ours that a file imports; the names that it takes of a package may be modules, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = own[: len(own) - node.level] if node.level else []
        module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        if module.split(".")[0] == "edgepeft":
            found |= {f"{module}.{item.name}" for item in node.names}
    return found


def _room(package: str, module: str) -> str | None:
    """The folder or loose module of the package that a module is in; None for what is in none."""
    prefix = f"edgepeft.{package}."
    name = module.removeprefix(prefix).split(".")[0]
    here = ROOT / package
    inside = module.startswith(prefix) and ((here / name).is_dir() or (here / f"{name}.py").is_file())
    return name if inside and name != "__init__" else None


def main() -> None:
    """Write the drawings."""
    for package, order in listed(PAGE.read_text("utf-8")).items():
        found = arrows(package)
        if bad := wrong(order, found):
            raise SystemExit(f"{package}: not downwards in {PAGE.name}, or not listed: {bad}")
        (ASSETS / f"{package}.svg").write_text(drawing(order, found), encoding="utf-8")


if __name__ == "__main__":
    main()
