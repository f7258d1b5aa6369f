"""The budgets that keep the package readable, each a check over its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import deepspeed

PACKAGE = Path(deepspeed.__file__).parent
FILE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 7
PUBLIC_METHODS = 15
ATTRIBUTES = 15
ENGINE_METHODS = 40

WIDE_FRONT_DOORS = {"initialize", "init_inference", "init_distributed", "get_model_profile", "FlopsProfiler"}
WIDE_FRONT_DOORS |= {"configure"}
"""Functions whose many parameters are the documented interface. So are those of optimizers, schedules and estimators."""

READERS_OF_THE_ENVIRONMENT = {"launcher", "accelerator", "native", "comm"}
"""``comm`` among them: the variables by which torchrun and its kind introduce a rank are the interface of a rendezvous."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def nodes(kind: type | tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}", node


def public_definitions(body: list[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def code_lines(function: Function) -> int:
    """Lines of a function from ``def`` on, without its docstring."""
    total = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        total -= (first.end_lineno or 0) - first.lineno + 1
    return total


def parameters(function: Function) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def own_attributes(definition: ast.ClassDef) -> set[str]:
    return {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def test_files_are_short() -> None:
    long = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in trees()}
    assert {name: lines for name, lines in long.items() if lines > FILE_LINES} == {}


def test_functions_fit_a_screen() -> None:
    functions = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    assert [f"{place} {f.name}: {code_lines(f)}" for place, f in functions if code_lines(f) > FUNCTION_LINES] == []


def test_functions_have_few_parameters() -> None:
    wide = [
        f"{place} {f.name}: {len(parameters(f))}"
        for place, f in nodes((ast.FunctionDef, ast.AsyncFunctionDef))
        if len(parameters(f)) > PARAMETERS and f.name not in WIDE_FRONT_DOORS and not _is_documented(place)
    ]
    assert wide == []


def _is_documented(place: str) -> bool:
    return place.startswith(("optim/", "memory/estimate", "zero/init", "zero/tiling"))


def test_classes_are_small() -> None:
    for place, definition in nodes(ast.ClassDef):
        methods = {
            node.name
            for node in definition.body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_")
        }
        limit = ENGINE_METHODS if definition.name in ("DeepSpeedEngine", "EngineInformation") else PUBLIC_METHODS
        assert len(methods) <= limit, f"{place} {definition.name} has {len(methods)} public methods"
        attributes = own_attributes(definition)
        assert len(attributes) <= ATTRIBUTES, f"{place} {definition.name} has {len(attributes)} attributes"


def test_what_is_public_is_documented() -> None:
    missing = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path, tree in trees().items()
        for node in public_definitions(tree.body)
        if ast.get_docstring(node) is None and not _overrides_or_overloads(node)
    ]
    missing += [f"{path.relative_to(PACKAGE)}" for path, tree in trees().items() if ast.get_docstring(tree) is None]
    assert missing == []


def _overrides_or_overloads(node: Function | ast.ClassDef) -> bool:
    names = {ast.unparse(decorator) for decorator in node.decorator_list}
    return any(name.endswith((".setter", "overload", "override")) for name in names)


def test_there_is_no_global_state_and_no_star_import() -> None:
    assert [place for place, _ in nodes(ast.Global)] == []
    stars = [place for place, node in nodes(ast.ImportFrom) if any(alias.name == "*" for alias in node.names)]
    assert stars == []


def test_torch_is_never_patched() -> None:
    patches = []
    for place, node in nodes((ast.Assign, ast.AugAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute) and ast.unparse(target).startswith("torch."):
                patches.append(f"{place} {ast.unparse(target)}")
    assert patches == []


def test_the_environment_is_read_in_few_rooms() -> None:
    readers = [
        place
        for place, node in nodes(ast.Attribute)
        if ast.unparse(node) in ("os.environ", "os.getenv") and place.split("/")[0] not in READERS_OF_THE_ENVIRONMENT
    ]
    assert readers == []


def test_an_assertion_says_what_it_means() -> None:
    assert [place for place, node in nodes(ast.Assert) if node.msg is None] == []
