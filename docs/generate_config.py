"""Writes docs/config.md from the config classes of core and of the first-party plugins.

    python docs/generate_config.py

A test regenerates the page and compares, so that no field goes undocumented.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import attrs
from prl.cli.plugins import survey
from prl.compose.config import SECTION_KINDS, Run

PAGE = Path(__file__).with_name("config.md")

INTRODUCTION = """\
# Config

<!-- written by docs/generate_config.py: edit the classes it reads -->

A run is one TOML file. `prl config check FILE` reports everything wrong with it at once, `prl config show FILE` prints
it with its layers merged and every default written out, `prl config diff A B` what two of them do not share.

- `plugins = [...]` names what may be used. Nothing that is installed acts unless it is named. `--plugins x,no:y`
  appends `x` and removes `y`.
- `extends = "base.toml"` (or a list of files, relative to this one) puts other files beneath this one: tables merge,
  values replace, `plugins` lists are united. A section whose `type` changes keeps nothing of the one it replaces.
- `--set section.key=value` comes last; lists by index: `--set environments.0.weight=2`. Quotes may be left out.
- `type = "..."` chooses a provider of a plugin; the section's other fields are that provider's.
- Nothing is coerced: `steps = "3"` is an error. An integer may stand where a float is wanted.

Below: core's own sections, then the ones that plugins provide. `prl plugins show NAME` prints the same for any plugin,
first-party or not.
"""


def page() -> str:
    return "\n".join([INTRODUCTION, *core_sections(), *provided_sections()])


def core_sections() -> Iterator[str]:
    yield "## Top level\n"
    yield table(Run)
    for name, kind in get_type_hints(Run).items():
        if attrs.has(kind) and kind not in SECTION_KINDS:
            yield from section(name, kind)


def section(name: str, kind: type) -> Iterator[str]:
    """With the sections inside it."""
    yield f"## `[{name}]`\n"
    yield f"{purpose(kind)}\n"
    yield table(kind)
    for inside, of in get_type_hints(kind).items():
        if attrs.has(of) and of not in SECTION_KINDS:
            yield from section(f"{name}.{inside}", of)


def provided_sections() -> Iterator[str]:
    plugins = [plugin for plugin in survey() if plugin["distribution"] == "prl"]
    for kind in SECTION_KINDS.values():
        yield f"## {heading(kind)}\n"
        for plugin in plugins:
            for provider in plugin["provides"]:
                if provider["kind"] == kind:
                    yield f'### `type = "{provider["name"]}"` (plugin `{plugin["name"]}`)\n'
                    yield f"{provider['summary'][0].upper()}{provider['summary'][1:]}.\n"
                    yield rows(provider["fields"])


def heading(kind: str) -> str:
    """Where sections of a kind are written."""
    base = next(base for base, of in SECTION_KINDS.items() if of == kind)
    return sentence(base).removeprefix("Base of ").removesuffix(" sections.")


def purpose(kind: type) -> str:
    """What the docstring says after the name of the section."""
    text = sentence(kind).partition(": ")[2]
    return text[0].upper() + text[1:]


def sentence(kind: type) -> str:
    """The docstring, on one line."""
    return " ".join((inspect.getdoc(kind) or "").split())


def table(kind: type) -> str:
    return rows([field(a) for a in attrs.fields(kind)])


def field(attribute: attrs.Attribute[Any]) -> dict[str, Any]:
    """As `prl.cli.plugins.survey` describes the fields of plugins."""
    required = attribute.default is attrs.NOTHING
    optional_table = isinstance(attribute.default, attrs.Factory)  # type: ignore[arg-type]
    return {
        "name": attribute.name,
        "type": attribute.type,
        "default": None if required else "None" if optional_table else repr(attribute.default),
        "help": attribute.metadata["help"],
    }


def rows(fields: list[dict[str, Any]]) -> str:
    if not fields:
        return "No fields.\n"
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{f['name']}` | {type_of(f)} | {default(f)} | {cell(f['help'])} |" for f in fields]
    return "\n".join(lines) + "\n"


def type_of(field: dict[str, Any]) -> str:
    """Python's notation, but for sections, which have headings of their own."""
    name = str(field["type"])
    if "Config" in name or "Section" in name:
        return "sections" if name.startswith("tuple") else "section"
    return f"`{cell(name)}`"


def default(field: dict[str, Any]) -> str:
    """As one would write it in TOML; nothing for what is absent unless given."""
    if field["default"] is None:
        return "required"
    value = ast.literal_eval(field["default"])
    return "" if value is None else f"`{cell(json.dumps(value, ensure_ascii=False))}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
