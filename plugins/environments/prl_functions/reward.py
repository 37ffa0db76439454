"""The user's reward function: found by name, called with a reply and its row, its answer checked.

Whatever is wrong with it is said in a sentence that names it and the row; it never turns into a reward.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat

from prl.compose.discover import did_you_mean
from prl.errors import InfrastructureError, UserError
from prl.providers import Score

from prl_functions.rows import Row


class RewardFunction:
    """`reward(completion, **row)`, awaited when it is async and run in a thread when it is not.

    It is given those keys of the row that it has parameters for; all of them when it takes `**row`. Threads mean that
    several calls may run at once.
    """

    def __init__(self, reference: str) -> None:
        self.reference = reference
        self._function = _find(reference)
        self._parameters = list(inspect.signature(self._function).parameters.values())[1:]
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in self._parameters)
        self._named = [p for p in self._parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]

    def check(self, row: Row) -> None:
        """UserError when the function wants what the row does not have."""
        for parameter in self._named:
            if parameter.default is parameter.empty and parameter.name not in row.values:
                raise UserError(
                    f"{row.place}: has no {parameter.name!r}, which the reward function {self.reference} asks for"
                    f"{did_you_mean(parameter.name, row.values)}"
                )

    async def __call__(self, completion: str, row: Row) -> Score:
        """InfrastructureError when the function raises or returns something that is no reward."""
        try:
            answer = await self._call(completion, self._arguments(row))
        except Exception as error:  # the user's code may raise anything
            what = f"{type(error).__name__}: {error}{_origin(error)}"
            raise InfrastructureError(f"reward function {self.reference} failed on {row.place}: {what}") from error
        return self._as_score(answer, row)

    def _arguments(self, row: Row) -> dict[str, Any]:
        if self._takes_all:
            return dict(row.values)
        return {p.name: row.values[p.name] for p in self._named if p.name in row.values}

    async def _call(self, completion: str, arguments: Mapping[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self._function):
            return await self._function(completion, **arguments)
        return await asyncio.to_thread(self._function, completion, **arguments)

    def _as_score(self, answer: Any, row: Row) -> Score:
        reward, metrics = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
        if not (_is_number(reward) and isinstance(metrics, Mapping) and all(map(_is_number, metrics.values()))):
            raise InfrastructureError(
                f"reward function {self.reference} returned {answer!r} on {row.place}; "
                "expected a finite number, or one and a dict of such numbers"
            )
        accuracy = float(float(reward) >= 1.0)
        return Score(reward=float(reward), metrics={"accuracy": accuracy, **{k: float(v) for k, v in metrics.items()}})


def _is_number(value: Any) -> bool:
    """Numbers of numpy and torch are numbers too; text that reads like one is not."""
    return isinstance(value, SupportsFloat) and math.isfinite(value)


def _find(reference: str) -> Callable[..., Any]:
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name:
        raise UserError(f'reward = {reference!r}: expected "package.module:function" or "path/to/file.py:function"')
    is_file = where.endswith(".py")
    module = _load_file(reference, Path(where)) if is_file else _imported(reference, lambda: import_module(where))
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise UserError(f"reward = {reference!r}: {where} has no function {name!r}{did_you_mean(name, known)}")
    return function


def _load_file(reference: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"reward = {reference!r}: there is no file {str(path)!r} (from {Path.cwd()})")
    return _imported(reference, lambda: _execute(path))


def _execute(path: Path) -> ModuleType:
    """The file as a module of its own, whatever else has its stem for a name."""
    name = f"prl_functions:{path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look their module up
    spec.loader.exec_module(module)
    return module


def _imported(reference: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except Exception as error:  # a module may raise anything while it is imported
        raise UserError(
            f"reward = {reference!r} cannot be imported: {type(error).__name__}: {error}{_origin(error)}"
        ) from error


def _origin(error: BaseException) -> str:
    """File and line that raised, where that is the user's code."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "" if frame.filename == __file__ or "importlib" in frame.filename else f" ({frame.filename}:{frame.lineno})"
