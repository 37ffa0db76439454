"""`prl weights inspect|compare|convert`: checkpoints in Hugging Face's form, in any installed number format."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from prl.cli.table import columns

if TYPE_CHECKING:
    from prl.blocks.form import Form
    from prl.blocks.inspection import Comparison, Kind, Parameters
    from prl.compose.registry import Registry
    from prl.providers import Model, NumberFormat

_SHOWN = 20
"""Lines of a list that are printed without --all."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("weights", help="convert, inspect and compare checkpoints", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    inspection = commands.add_parser(
        "inspect", help="tensors, types, shapes, parameter counts", description=inspect.__doc__
    )
    inspection.add_argument("folder", type=Path, metavar="FOLDER")
    inspection.set_defaults(run=inspect)
    comparison = commands.add_parser("compare", help="how far two checkpoints are apart", description=compare.__doc__)
    comparison.add_argument("first", type=Path, metavar="A")
    comparison.add_argument("second", type=Path, metavar="B")
    comparison.set_defaults(run=compare)
    for command in (inspection, comparison):
        command.add_argument("--all", action="store_true", help="every tensor on a line of its own")
        command.add_argument("--json", action="store_true", help="for programs")
    conversion = commands.add_parser("convert", help="to another number format", description=convert.__doc__)
    conversion.add_argument("source", type=Path, metavar="SOURCE")
    conversion.add_argument("target", type=Path, metavar="TARGET", help="a folder without weights")
    conversion.add_argument(
        "--to", required=True, metavar="FORMAT", help="a type of [quantization]: bf16, fp8_block, ..."
    )
    conversion.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default 5)")
    conversion.set_defaults(run=convert)


# --- inspect ----------------------------------------------------------------------------------------------------------
def inspect(arguments: argparse.Namespace) -> int:
    """List what a checkpoint holds, tensors of like names together, and count the model's parameters."""
    from prl.blocks import inspection
    from prl.blocks.conversion import reading

    registry = _installed()
    folder: Path = arguments.folder
    found = inspection.kinds(folder, one_by_one=arguments.all)
    counted = inspection.parameters(folder, reading(folder, _formats(registry)), _carried(registry, folder))
    if arguments.json:
        print(
            json.dumps(
                {"parameters": attrs.asdict(counted), "tensors": [attrs.asdict(kind) for kind in found]}, indent=1
            )
        )
    else:
        print(_inspected(found, counted))
    return 0


def _inspected(found: list[Kind], counted: Parameters) -> str:
    rows = [["TENSORS", "COUNT", "TYPE", "SHAPE"]]
    rows += [[kind.names, f"{kind.count:,}", kind.dtype, " x ".join(map(str, kind.shape))] for kind in found]
    active = "active parameters unknown" if counted.active is None else f"{counted.active:,} active"
    lines = [f"{counted.total:,} parameters, {active}"]
    lines += [f"{count:,} more under {prefix}" for prefix, count in counted.carried.items()]
    return "\n".join([columns(rows, indent=0), "", *lines])


# --- compare ----------------------------------------------------------------------------------------------------------
def compare(arguments: argparse.Namespace) -> int:
    """Compare two checkpoints by name, decoded; exit code 0 when every tensor has the same values, else 1."""
    from prl.blocks import inspection
    from prl.blocks.conversion import reading

    formats = _formats(_installed())
    first, second = arguments.first, arguments.second
    found = inspection.compare(first, second, formats=(reading(first, formats), reading(second, formats)))
    if arguments.json:
        print(json.dumps({**attrs.asdict(found), "same": found.same}, indent=1))
    else:
        print(_compared(found, None if arguments.all else _SHOWN))
    return 0 if found.same else 1


def _compared(found: Comparison, shown: int | None) -> str:
    rows = [[d.name, d.note or f"{d.largest:.3g}"] for d in found.different]
    parts = [f"{found.compared:,} tensors in both, {len(rows):,} of them different"]
    if rows:
        parts.append(_cut([["TENSOR", "LARGEST DIFFERENCE"], *rows], shown))
    for side, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            parts.append(f"only in the {side}: {len(names):,}\n" + _cut([[name] for name in names], shown))
    return "\n\n".join(parts)


def _cut(rows: list[list[str]], shown: int | None) -> str:
    more = len(rows) - shown if shown is not None else 0
    return columns(rows[:shown]) + (f"\n  and {more:,} more (--all)" if more > 0 else "")


# --- convert ----------------------------------------------------------------------------------------------------------
def convert(arguments: argparse.Namespace) -> int:
    """Write a checkpoint in another number format, or in files of another size, a tensor at a time."""
    from prl.blocks.conversion import convert as write
    from prl.blocks.form import Form
    from prl.errors import UserError

    if not arguments.shard_gb > 0:
        raise UserError(f"--shard-gb must be more than 0, got {arguments.shard_gb}")
    registry = _installed()
    chosen = _format(registry, arguments.to)
    family = _family(registry, arguments.source)
    form: Form | None = None if family is None else Form.of_family(family, chosen)
    done = write(
        arguments.source,
        arguments.target,
        form,
        chosen,
        _formats(registry),
        max_shard_bytes=int(arguments.shard_gb * 1e9),
    )
    how = "as they were" if done.copied else f"in {arguments.to}"
    print(f"{arguments.target}: {done.tensors:,} tensors {how}, {done.nbytes / 1e9:,.3f} GB")
    return 0


# --- what is installed ------------------------------------------------------------------------------------------------
def _installed() -> Registry:
    """Every provider that works here; broken plugins are `prl plugins`' affair."""
    from prl.compose.discover import installed
    from prl.compose.plugins import Hooks
    from prl.compose.registry import build

    known, hooks = installed(), Hooks()
    hooks.load(known, known)
    registry, _ = build(hooks.provided()[0])
    return registry


def _formats(registry: Registry) -> list[NumberFormat]:
    return [_format(registry, name) for name in registry.names("quantization")]


def _format(registry: Registry, name: str) -> NumberFormat:
    from prl.compose.checks import unavailable
    from prl.compose.discover import did_you_mean
    from prl.errors import UserError
    from prl.providers import Quantization

    entry = registry.find("quantization", name)
    if entry is None:
        known = registry.names("quantization")
        raise UserError(f"there is no number format {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}")
    provider = entry.provider
    assert isinstance(provider, Quantization)
    if reason := unavailable(provider, None):
        raise UserError(f"number format {name!r} is {reason}")
    number_format: NumberFormat = _load(provider.build)(provider.config())
    return number_format


def _family(registry: Registry, folder: Path) -> Model | None:
    """The model provider that knows checkpoints of this type."""
    from prl.blocks.checkpoint import read_config
    from prl.providers import Model

    kind = read_config(folder).get("model_type")
    providers = (entry.provider for entry in registry.entries.values())
    return next((p for p in providers if isinstance(p, Model) and kind in p.checkpoint_types), None)


def _carried(registry: Registry, folder: Path) -> list[str]:
    """Prefixes of what the family's networks leave out; none where no plugin builds such a model."""
    from prl.errors import UserError

    family = _family(registry, folder)
    if family is None:
        return []
    try:
        return list(_load(family.weights)(family.config(checkpoint=str(folder)), 0).carried)
    except UserError:
        return []


def _load(ref: str) -> Any:
    import importlib

    module, _, attribute = ref.partition(":")
    return getattr(importlib.import_module(module), attribute)
