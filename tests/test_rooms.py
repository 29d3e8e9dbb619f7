"""Rooms: the folders and files directly below a package. No circle of imports, late and type-only ones counted.

A circle is found as a set of modules, or of rooms, that import one another. The finder is shown to have power on
trees that have one before it is trusted with the packages, which should not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.test_architecture import PACKAGES, Module, modules

# Where a package is entered by rooms of its own, the most that it may have.
ROOMS = {"stablediffusion": 14, "toy": 12}
INNER = ("sdeblend/evaluate", "sdeblend/finetune", "sdeblend/methods", "sdeblend/steps")

Graph = dict[str, set[str]]


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def module_graph(found: Iterable[Module]) -> Graph:
    """Return which modules import which, a package's ``__init__`` standing for what is imported from it."""
    trees = {dotted(module.path): module for module in found}
    graph: Graph = {name: set() for name in trees}
    for name, module in trees.items():
        for one in module.imports():
            target = one.name
            while target and target not in trees:
                target = target.rpartition(".")[0]
            # A module may import its own parent's name without being imported by it.
            if target and target != name:
                graph[name].add(target)
    return graph


def rooms_of(graph: Graph, folder: str) -> Graph:
    """Return the graph of what lies directly below a folder; its ``__init__`` is no room."""
    prefix = folder.replace("/", ".") + "."

    def room(name: str) -> str | None:
        return name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else None

    out: Graph = {}
    for name, targets in graph.items():
        if (own := room(name)) is not None:
            out.setdefault(own, set()).update({other for t in targets if (other := room(t)) not in (None, own)})
    return out


def circles(graph: Graph) -> list[list[str]]:
    """Return the sets of nodes that reach one another, each sorted."""
    reach: Graph = {}
    for start in graph:
        seen, pending = set[str](), [start]
        while pending:
            for following in graph.get(pending.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    pending.append(following)
        reach[start] = seen
    sets = {tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in graph if a in reach[a]}
    return [list(one) for one in sorted(sets)]


def parse(**sources: str) -> list[Module]:
    return [Module(Path(name.replace("__", "/") + ".py"), ast.parse(source)) for name, source in sources.items()]


CIRCLES = {
    "files": parse(toy__a="from toy.b import f", toy__b="from toy.a import g"),
    "late": parse(toy__a="def f():\n    from toy.b import f", toy__b="import toy.a"),
    "type-only": parse(
        toy__a="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.b import C",
        toy__b="from toy import a",
    ),
    "three": parse(toy__a="import toy.b", toy__b="import toy.c", toy__c="from toy.a import x"),
}


@pytest.mark.parametrize("kind", CIRCLES)
def test_a_circle_is_found(kind: str) -> None:
    found = circles(module_graph(CIRCLES[kind]))
    assert found == [["toy.a", "toy.b", "toy.c"][: len(CIRCLES[kind])]]
    # the last module's imports cut, there is none
    assert circles(module_graph([*CIRCLES[kind][:-1], Module(CIRCLES[kind][-1].path, ast.parse(""))])) == []


def test_a_circle_of_rooms_need_not_be_one_of_files() -> None:
    found = parse(toy__a__one="import toy.b.two", toy__b__two="", toy__b__three="import toy.a.four", toy__a__four="")
    graph = module_graph(found)
    assert circles(graph) == [] and circles(rooms_of(graph, "toy")) == [["a", "b"]]


def test_no_circle_of_files() -> None:
    assert circles(module_graph(modules())) == []


@pytest.mark.parametrize("folder", [*PACKAGES, *INNER])
def test_no_circle_of_rooms(folder: str) -> None:
    rooms = rooms_of(module_graph(modules()), folder)
    assert len(rooms) > 1, f"{folder} has no rooms to check"
    assert circles(rooms) == []


@pytest.mark.parametrize("package", ROOMS)
def test_a_package_is_entered_by_few_rooms(package: str) -> None:
    rooms = rooms_of(module_graph(modules()), package)
    assert len(rooms) <= ROOMS[package], sorted(rooms)
