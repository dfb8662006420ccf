"""The mutants of a module: cosmic-ray's operators, less those that change no behaviour."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

# Of the replacements of an operator, those that a hand might have written: the others mostly raise a TypeError, which
# any test notices.
_BINARY = {
    "Add": ("Sub", "Mul"),
    "Sub": ("Add", "Div"),
    "Mul": ("Div", "Add", "Pow"),
    "Div": ("Mul", "FloorDiv"),
    "FloorDiv": ("Mul", "Mod"),
    "Mod": ("FloorDiv", "Add"),
    "Pow": ("Mul", "Div"),
    "RShift": ("LShift", "FloorDiv"),
    "LShift": ("RShift", "Add"),
    "BitOr": ("BitAnd", "BitXor"),
    "BitAnd": ("BitOr", "BitXor"),
    "BitXor": ("BitOr", "BitAnd"),
}
_COMPARISON = {
    "Eq": ("NotEq", "LtE", "GtE"),
    "NotEq": ("Eq", "Lt", "Gt"),
    "Lt": ("LtE", "GtE", "NotEq"),
    "LtE": ("Lt", "Gt", "Eq"),
    "Gt": ("GtE", "LtE", "NotEq"),
    "GtE": ("Gt", "Lt", "Eq"),
    "Is": ("IsNot",),
    "IsNot": ("Is",),
}
_UNARY = {"USub": ("UAdd",), "Invert": ("Delete",), "Not": ("Delete",)}
_REPLACED = {"BinaryOperator": _BINARY, "ComparisonOperator": _COMPARISON, "UnaryOperator": _UNARY}
_NEED_ARGUMENTS = ("VariableReplacer", "VariableInserter")


@dataclass(frozen=True)
class Mutant:
    """One change: ``before`` and ``after`` are the lines that differ, stripped."""

    name: str
    line: int
    before: str
    after: str
    source: str

    def described(self) -> dict[str, object]:
        return {"name": self.name, "line": self.line, "before": self.before, "after": self.after}


def code_hash(source: str) -> str:
    """A hash of what the source does: comments, layout and docstrings do not count."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Every mutant of the source that compiles to something else; annotations and imports are left alone."""
    skipped = _unread(source)
    original, found = ast.dump(ast.parse(source)), {}
    nodes = list(ast_nodes(get_ast(source)))
    for operator_name in operator_names():
        short = operator_name.split("/")[1]
        if not _is_used(short):
            continue
        operator = get_operator(operator_name)()
        positions = [span for node in nodes for span in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(positions):
            if any(first <= start < last for first, last in skipped):
                continue
            mutated = mutate_code(source, operator, occurrence)
            try:
                changed = ast.dump(ast.parse(mutated))
            except SyntaxError:
                continue
            if changed != original and changed not in found:
                found[changed] = _described(f"{module}/{short}/{occurrence}", source, mutated, start[0])
    return list(found.values())


def _is_used(operator: str) -> bool:
    """Whether an operator of cosmic-ray's takes part: "ReplaceBinaryOperator_Add_Sub", "NumberReplacer" ..."""
    kind, *change = operator.removeprefix("Replace").split("_")
    if kind not in _REPLACED:
        return operator not in _NEED_ARGUMENTS
    if change[0] == "Delete":  # named the other way round
        change.reverse()
    return change[1] in _REPLACED[kind].get(change[0], ())


def _described(name: str, source: str, mutated: str, line: int) -> Mutant:
    old, new = source.splitlines(), mutated.splitlines()
    before = [text.strip() for text in old if text not in new]
    after = [text.strip() for text in new if text not in old]
    return Mutant(name, line, " ".join(before) or old[line - 1].strip(), " ".join(after) or "(removed)", mutated)


def _unread(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans of annotations, which nothing reads, and of imports: ((line, column), (line, column))."""
    return [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in _annotations(ast.parse(source))
        if node.end_lineno is not None and node.end_col_offset is not None
    ]


def _annotations(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
