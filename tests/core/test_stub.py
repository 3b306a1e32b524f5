"""Exact: the type stub names what the compiled core has, no more and no less, with the same docstrings."""

import ast
import inspect
from pathlib import Path

import onebit
from onebit import _core

STUB = ast.parse((Path(onebit.__file__).with_name("_core.pyi")).read_text())


def documented(nodes) -> dict[str, str | None]:
    return {
        node.name: ast.get_docstring(node)
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def public(owner) -> dict[str, object]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


def description(value: object) -> str:
    """The docstring without the signature that a compiled function shows first."""
    text = inspect.cleandoc(value.__doc__)
    return text if isinstance(value, type | property) else text.split("\n\n", 1)[1]


def test_the_module_matches():
    stub = documented(STUB.body)
    core = public(_core)
    constants = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
    assert stub.keys() | constants == core.keys()
    assert stub == {name: description(core[name]) for name in stub}
    assert ast.get_docstring(STUB) == _core.__doc__


def test_the_classes_match():
    for node in STUB.body:
        if isinstance(node, ast.ClassDef):
            stub = documented(node.body)
            stub.pop("__init__", None)
            core = public(getattr(_core, node.name))
            assert stub == {name: description(value) for name, value in core.items()}
