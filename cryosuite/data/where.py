"""``--where "pc1 > 2 and confidence > 0.8"``: conditions on columns, parsed by Python's grammar, never run by Python.

The text becomes Python's syntax tree, and an evaluator of our own walks it over numpy arrays. It knows numbers, text,
column names, comparisons (also chained, and ``in``), and/or/not, arithmetic and a few functions; all else is refused.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cryosuite.errors import InputError
from cryosuite.formats.checks import printable

LONGEST, DEEPEST = 4000, 60  # characters, levels of brackets
COMPARE = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
ARITHMETIC = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide, ast.Mod: np.mod,
              ast.Pow: np.power}  # fmt: skip
FUNCTIONS = {"abs": np.abs, "sqrt": np.sqrt, "log": np.log, "exp": np.exp}
TWO_WORDS = "write `and`, `or`, `not` between conditions"


@dataclass(frozen=True)
class Where:
    """A parsed condition; ``names``: the columns it asks for."""

    text: str
    tree: ast.expr
    names: tuple[str, ...]

    def rows(self, column: Callable[[str], np.ndarray], count: int) -> np.ndarray:
        """Where the condition holds, (count,) bool.

        Rows in which a column that was asked for is not a number (NaN) are never chosen, not even by ``not``.

        Args:
            column: a name to its values (count,), numbers or text. Raises InputError for a name that is none.

        Raises:
            InputError: text compared with numbers, a text used as a number, a value instead of a condition.
        """
        values = {name: np.asarray(column(name)) for name in self.names}
        with np.errstate(all="ignore"):
            found = _Evaluator(self.text, values).visit(self.tree)
        if not _is_condition(found):
            raise InputError(f'--where "{self.text}": is a value, not a condition: compare it, as in "pc1 > 2"')
        found = np.broadcast_to(found, (count,)).copy()
        for array in values.values():
            if array.dtype.kind == "f":
                found &= ~np.isnan(array)
        return found


def parse_where(text: str, known: Callable[[str], bool] = lambda name: True) -> Where:
    """Parse a condition.

    Args:
        known: whether a name with a slash (``ctf/df1_A`` of cryoSPARC) is a column; else the slash divides.

    Raises:
        InputError: with the place, for what is no condition or is not allowed.
    """
    shown = printable(text, 120)
    if len(text) > LONGEST:
        raise InputError(f'--where "{shown}": longer than {LONGEST} characters')
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        at = f" at character {error.offset}" if error.offset else ""
        raise InputError(
            f'--where "{shown}": cannot be read{at}. Expected a condition such as "pc1 > 2 and confidence > 0.8"'
        ) from None
    except (ValueError, MemoryError, RecursionError):
        raise InputError(f'--where "{shown}": cannot be read') from None
    tree = _Joined(known).join(tree, 0, shown)
    names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - _called(tree))
    return Where(shown, tree, tuple(names))


def _called(tree: ast.expr) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


class _Joined:
    """Looks through a tree: joins ``a / b`` where that is a column's name, refuses all that is not in the language."""

    def __init__(self, known: Callable[[str], bool]) -> None:
        self.known = known

    def join(self, node: ast.expr, depth: int, text: str) -> ast.expr:
        """The node with slashed names joined; InputError for anything unknown or nested too deeply."""
        if depth > DEEPEST:
            raise InputError(f'--where "{text}": brackets are nested too deeply')
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            name = _dotted(node)
            if name is not None and self.known(name):
                return ast.Name(name, ast.Load())
        self._allow(node, text)
        for field, value in ast.iter_fields(node):
            if isinstance(value, ast.expr) and not (isinstance(node, ast.Call) and field == "func"):
                setattr(node, field, self.join(value, depth + 1, text))
            elif isinstance(value, list) and value and isinstance(value[0], ast.expr):
                setattr(node, field, [self.join(item, depth + 1, text) for item in value])
        return node

    @staticmethod
    def _allow(node: ast.expr, text: str) -> None:
        """InputError for what is not in the language."""
        problem = None
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, (ast.BitAnd, ast.BitOr, ast.BitXor)):
                problem = TWO_WORDS
            elif type(node.op) not in ARITHMETIC:
                problem = "only + - * / % ** are known between numbers"
        elif isinstance(node, ast.UnaryOp):
            problem = TWO_WORDS if isinstance(node.op, ast.Invert) else None
        elif isinstance(node, ast.Compare):
            wrong = [op for op in node.ops if type(op) not in COMPARE and not isinstance(op, (ast.In, ast.NotIn))]
            problem = "use == and != to compare" if wrong else None
        elif isinstance(node, ast.Call):
            simple = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
            if not simple or node.keywords or len(node.args) != 1:
                problem = f"the only functions are {', '.join(FUNCTIONS)}, each of one value"
        elif isinstance(node, ast.Constant):
            if not isinstance(node.value, (int, float, str)):
                problem = f"{printable(node.value)} is neither a number nor a text in quotes"
        elif not isinstance(node, (ast.Name, ast.BoolOp, ast.List, ast.Tuple)):
            problem = f"{type(node).__name__} is not known here"
        if problem:
            raise InputError(f'--where "{text}": {problem}')


def _dotted(node: ast.expr) -> str | None:
    """``a / b`` of two plain names as the text a/b."""
    parts = (node.left, node.right) if isinstance(node, ast.BinOp) else ()
    if all(isinstance(part, ast.Name) for part in parts):
        return "/".join(part.id for part in parts)
    return None


def _is_condition(value: Any) -> bool:
    return np.asarray(value).dtype.kind == "b"


class _Evaluator:
    """Values of a tree that ``_Joined`` has looked through."""

    def __init__(self, text: str, columns: dict[str, np.ndarray]) -> None:
        self.text, self.columns = text, columns

    def visit(self, node: ast.expr) -> Any:
        """The value of a node: an array, a number or a text."""
        return getattr(self, f"_{type(node).__name__.lower()}")(node)

    def _refuse(self, problem: str) -> InputError:
        return InputError(f'--where "{self.text}": {problem}')

    def _name(self, node: ast.Name) -> np.ndarray:
        return self.columns[node.id]

    def _constant(self, node: ast.Constant) -> Any:
        value = node.value
        if isinstance(value, int) and not isinstance(value, bool):
            return value if -(2**63) <= value < 2**64 else float(value) if abs(value) < 10**300 else np.inf
        return value

    def _list(self, node: ast.List | ast.Tuple) -> list[Any]:
        return [self.visit(item) for item in node.elts]

    _tuple = _list

    def _number(self, node: ast.expr) -> Any:
        value = self.visit(node)
        if isinstance(value, list) or np.asarray(value).dtype.kind not in "biuf":
            raise self._refuse(f"{printable(ast.unparse(node))} is no number, so it cannot be calculated with")
        return value if isinstance(value, np.ndarray) and value.dtype.kind == "f" else np.asarray(value, np.float64)

    def _condition(self, node: ast.expr) -> np.ndarray:
        value = self.visit(node)
        if isinstance(value, list) or not _is_condition(value):
            raise self._refuse(f"{printable(ast.unparse(node))} is a value, not a condition: compare it with something")
        return np.asarray(value)

    def _boolop(self, node: ast.BoolOp) -> np.ndarray:
        join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        found = self._condition(node.values[0])
        for value in node.values[1:]:
            found = join(found, self._condition(value))
        return found

    def _unaryop(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return np.logical_not(self._condition(node.operand))
        value = self._number(node.operand)
        return -value if isinstance(node.op, ast.USub) else value

    def _binop(self, node: ast.BinOp) -> Any:
        return ARITHMETIC[type(node.op)](self._number(node.left), self._number(node.right))

    def _call(self, node: ast.Call) -> Any:
        return FUNCTIONS[node.func.id](self._number(node.args[0]))

    def _compare(self, node: ast.Compare) -> np.ndarray:
        left, found = self.visit(node.left), np.True_
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.visit(right_node)
            if isinstance(op, (ast.In, ast.NotIn)):
                inside = self._inside(left, right)
                found = found & (inside if isinstance(op, ast.In) else ~inside)
            else:
                found = found & self._pair(left, right, op)
            left = right
        return found

    def _pair(self, left: Any, right: Any, op: ast.cmpop) -> np.ndarray:
        if isinstance(left, list) or isinstance(right, list):
            raise self._refuse("a list of values stands behind `in`")
        texts = [np.asarray(side).dtype.kind in "OUS" for side in (left, right)]
        if texts[0] != texts[1]:
            value = left if texts[0] else right
            named = f" ({value!r})" if isinstance(value, str) else ""
            raise self._refuse(f"text{named} is compared with numbers")
        if texts[0] and not isinstance(op, (ast.Eq, ast.NotEq)):
            raise self._refuse("text can be compared by ==, != and in only")
        return np.asarray(COMPARE[type(op)](left, right))

    def _inside(self, left: Any, right: Any) -> np.ndarray:
        if isinstance(left, list):
            raise self._refuse("a list of values stands behind `in`")
        if isinstance(right, str):  # "mic_01" in micrograph is the other way round; this is micrograph in "a.mrc"
            right = [right]
        if isinstance(left, str) and isinstance(right, np.ndarray) and right.dtype.kind in "OUS":
            return np.char.find(right.astype(str), left) >= 0
        if not isinstance(right, list):
            raise self._refuse(
                'behind `in` a list such as [1, 4] is expected, or a column of text as in "mic_3" in name'
            )
        kind = np.asarray(left).dtype.kind in "OUS"
        if any(isinstance(item, (list, np.ndarray)) or isinstance(item, str) != kind for item in right):
            raise self._refuse("the values behind `in` are not of the kind of those before it")
        found = np.zeros(np.shape(left), bool)
        for item in right:
            found |= np.asarray(left == item)
        return found
