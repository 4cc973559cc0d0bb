"""The notebook as data: its parameters, the commands it would run, and what must not be in it. Needs no notebook library."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from pipeline.config import parse
from pipeline.errors import UserError, nearest

NOTEBOOK = Path(__file__).with_name("distrinews.ipynb")
METADATA = Path(__file__).with_name("kernel-metadata.json")
CREDENTIALS = {
    "a Hugging Face token": r"\bhf_\w{20,}",
    "a GitHub token": r"\b(?:gh[pousr]|github_pat)_\w{20,}",
    "a Kaggle key": r"\bkey\W{1,6}[0-9a-f]{32}\b",
    "a password in an address": r"://[^/\s:@'\"]+:[^/\s@'\"]+@",
}
SECRET_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")


def read(path: Path = NOTEBOOK) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Id and source of each code cell."""
    return ((cell["id"], "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code")


def parameters(notebook: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of the cells tagged as parameters; the later one wins."""
    values: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if {"parameters", "injected-parameters"} & set(cell["metadata"].get("tags", [])):
            for node in ast.parse("".join(cell["source"])).body:
                assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name), "a parameter is NAME = value"
                values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def with_parameters(notebook: Mapping[str, Any], values: Mapping[str, str | int | bool]) -> dict[str, Any]:
    """A copy with a cell of these values after the parameters, tagged as papermill tags it.

    A word is turned into what the parameter is: a number, True or False. Raises UserError for a name or value that does not fit.
    """
    defaults, lines = parameters(notebook), []
    for name, value in values.items():
        if name not in defaults:
            raise UserError(f"the notebook has no parameter '{name}'.{nearest(name, defaults)} It has {', '.join(defaults)}.")
        kind = type(defaults[name])
        try:
            given = ast.literal_eval(str(value)) if kind is not str else str(value)
        except (ValueError, SyntaxError):
            given = value
        if not isinstance(given, kind) and not (kind is int and isinstance(given, float)):
            raise UserError(f"{name} is '{value}': allowed is {'True or False' if kind is bool else 'a number'}.")
        lines.append(f"{name} = {given!r}")
    changed = copy.deepcopy(dict(notebook))
    at = next(i for i, cell in enumerate(changed["cells"]) if "parameters" in cell["metadata"].get("tags", []))
    added: dict[str, Any] = {"cell_type": "code", "id": "injected-parameters", "metadata": {"tags": ["injected-parameters"]}, "execution_count": None,
            "outputs": [], "source": "\n".join(lines)}  # fmt: skip
    changed["cells"].insert(at + 1, added)
    return changed


def commands(notebook: Mapping[str, Any]) -> list[str]:
    """What the cells would hand to `run`, their parameters in place; nothing is carried out but the making of those words."""
    names: dict[str, Any] = {}
    found: list[str] = []

    def plain(node: ast.AST) -> bool:
        return not any(isinstance(part, ast.Call) for part in ast.walk(node))

    def value(node: ast.expr) -> Any:
        return eval(compile(ast.Expression(node), "notebook", "eval"), {}, names)

    def walk(statements: list[ast.stmt]) -> None:
        for node in statements:
            if isinstance(node, ast.If):
                walk(node.body if not plain(node.test) or value(node.test) else node.orelse)
            elif isinstance(node, ast.Assign | ast.AugAssign) and plain(node):
                with contextlib.suppress(NameError):  # made of what a command has left
                    exec(compile(ast.Module([node], []), "notebook", "exec"), {}, names)
            elif isinstance(node, ast.Expr) and isinstance(call := node.value, ast.Call) and ast.unparse(call.func) == "run":
                found.append(value(call.args[0]))

    for _, source in code_cells(notebook):
        walk(ast.parse(source).body)
    return found


def problems(notebook: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """What would spend a session in vain, or tell a secret; one line each."""
    found = [f"cell '{cell['id']}' has outputs or a number: clear them" for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")]  # fmt: skip
    for name, source in code_cells(notebook):
        try:
            ast.parse(source)
        except SyntaxError as error:
            found.append(f"cell '{name}' is no Python: {error}")
    if not found:
        try:
            found = [f"`{command}`: {reason}" for command in commands(notebook) if (reason := misunderstood(command))]
        except NameError as error:
            found = [f"a command needs what no cell gives it: {error}"]
    return found + [f"{kind} is in it; take it out and revoke it" for kind in credentials(json.dumps(notebook), environment)]


def credentials(text: str, environment: Mapping[str, str]) -> list[str]:
    """Kinds of credentials in the text: by their looks, and by being the value of such a variable of this environment."""
    found = [kind for kind, pattern in CREDENTIALS.items() if re.search(pattern, text)]
    return found + [
        f"the value of {name}" for name, value in environment.items() if SECRET_NAMES.search(name) and len(value) > 11 and value in text
    ]


def misunderstood(command: str) -> str | None:
    """Why this command would not be understood: a file or module that is not there, or options of a run that do not parse."""
    words = shlex.split(command)
    for word in words:
        if re.fullmatch(r"(configs/.+|requirements.*)\.\w+", word) and not (ROOT / word).is_file():
            return f"there is no {word}"
    if "-m" not in words or words[words.index("-m") + 1] == "pip":
        return None
    module, *arguments = words[words.index("-m") + 1 :]
    if importlib.util.find_spec(module) is None:
        return f"there is no module {module}"
    if module == "pipeline.doctor":
        del arguments[(at := arguments.index("--launch")) : at + 2]
    if module in ("pipeline.train", "pipeline.train_ddp", "pipeline.doctor"):
        try:
            parse(arguments)
        except UserError as error:
            return str(error)
    return None
