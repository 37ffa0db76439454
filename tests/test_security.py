"""What no wire and no file may rely on: formats that run code when they are read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("core", "plugins", "contrib") for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def violations(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (f"{node.lineno}: import {n.name}" for n in names if n.name.split(".")[0] in FORBIDDEN)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN:
                yield f"{node.lineno}: from {module}"
            case ast.Call():
                yield from (f"{node.lineno}: {reason}" for reason in _dangerous(node))


def _dangerous(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if given.get("allow_pickle", "False") != "False":
        yield f"{name} with allow_pickle"
    if name in ("eval", "exec", "__import__"):
        yield name
    if name.endswith((".send_pyobj", ".recv_pyobj", "_object_list", "all_gather_object", "gather_object")):
        yield f"{name}, which pickles"
    if name in ("multiprocessing.Queue", "multiprocessing.Pipe", "multiprocessing.Pool"):
        yield f"{name}, which pickles"


def test_nothing_is_pickled_anywhere():
    found = {str(path.relative_to(ROOT)): list(violations(path.read_text())) for path in SOURCES}
    assert {path: reasons for path, reasons in found.items() if reasons} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch, pickle as p",
        "from marshal import loads",
        "import shelve",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "socket.send_pyobj(message)",
        "dist.all_gather_object(out, value)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert len(list(violations(source))) == 1


def test_the_search_leaves_the_rest_alone():
    assert list(violations("torch.load(path, weights_only=True); np.load(path); model.eval(); import msgpack")) == []
