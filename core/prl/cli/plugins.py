"""`prl plugins [list]` and `prl plugins show NAME`: what is installed, whether it works here, and how it is configured.

Every plugin is tried on its own: a broken one is shown with its reason and hides nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs

from prl.cli.table import columns

if TYPE_CHECKING:
    from prl.compose.discover import InstalledPlugin
    from prl.compose.plugins import Provided

IMPORTED_BY = {
    ("model", "build"): "trainer, engine",
    ("model", "weights"): "trainer, engine",
    ("model", "render"): "environment",
    ("model", "limits"): "prl launch",
    ("model", "routing"): "controller, environment, trainer, engine",
    ("environment", "build"): "environment",
    ("scheduler", "build"): "controller",
    ("advantage", "build"): "controller",
    ("loss", "build"): "trainer",
    ("optimizer", "build"): "trainer",
    ("quantization", "build"): "trainer, engine",
    ("engine", "serve"): "engine",
    ("engine", "join"): "engine-part",
    ("engine", "connect"): "controller, environment",
    ("weight_transport", "send"): "trainer",
    ("weight_transport", "receive"): "engine",
    ("kernel", "build"): "trainer, engine",
    ("tracker", "build"): "controller",
    ("launcher", "build"): "launcher",
}
"""(kind, part) -> the processes that import it."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("plugins", help="what is installed and how it is configured", description=__doc__)
    parser.set_defaults(run=run_list, json=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    listing = commands.add_parser("list", help="every installed plugin (the default)")
    listing.set_defaults(run=run_list)
    show = commands.add_parser("show", help="one plugin: its providers, their fields, what each process imports")
    show.add_argument("name", metavar="NAME", help="a plugin's name")
    show.set_defaults(run=run_show)
    parser.add_argument("--json", action="store_true", help="for programs")
    for command in (listing, show):
        command.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="for programs")


def run_list(arguments: argparse.Namespace) -> int:
    from prl.compose.discover import undeclared

    found = survey()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    rows = [["PLUGIN", "DISTRIBUTION", "STATUS", "PROVIDES"]]
    rows += [[p["name"], f"{p['distribution']} {p['version']}", p["status"], _provides(p)] for p in found]
    print(columns(rows, indent=0))
    if undeclared():
        print(f"\nin this checkout, not installed yet: {', '.join(undeclared())}; run pip install -e . again")
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    from prl.compose.discover import did_you_mean
    from prl.errors import PluginError

    found = {plugin["name"]: plugin for plugin in survey()}
    if arguments.name not in found:
        providers = [
            f"{provider['kind']} {arguments.name!r} is provided by the plugin {plugin['name']!r}"
            for plugin in found.values()
            for provider in plugin["provides"]
            if provider["name"] == arguments.name
        ]
        hint = f"; {', '.join(providers)}" if providers else did_you_mean(arguments.name, found)
        raise PluginError(f"plugin {arguments.name!r} is not installed{hint}")
    plugin = found[arguments.name]
    print(json.dumps(plugin, indent=1) if arguments.json else _page(plugin))
    return 0


# --- what there is ----------------------------------------------------------------------------------------------------
def survey() -> list[dict[str, Any]]:
    """Everything known about every installed plugin, as JSON values."""
    from prl.compose.discover import installed
    from prl.compose.plugins import LIFECYCLE, Hooks

    known = installed()
    hooks = Hooks()
    failures = hooks.load(known, known)
    records, broken = hooks.provided()
    reasons = {failure.plugin: f"{failure.status}: {failure.reason}" for failure in [*failures, *broken]}
    observed = {hook: {plugin for plugin, _ in hooks.implementations(hook)} for hook in sorted(LIFECYCLE)}
    return [
        {
            "name": name,
            "distribution": claims[0].dist,
            "version": claims[0].version,
            "module": claims[0].module,
            "status": reasons.get(name) or _availability(own),
            "provides": [_provider(record, claims[0]) for record in own],
            "hooks": [hook for hook, plugins in observed.items() if name in plugins],
        }
        for name, claims in known.items()
        for own in [[record for record in records if record.plugin == name]]
    ]


def _availability(records: list[Provided]) -> str:
    from prl.compose.checks import missing_modules

    missing = {module for record in records for module in missing_modules(record.provider)}
    return f"unavailable: needs {', '.join(sorted(missing))}" if missing else "ok"


def _provider(record: Provided, plugin: InstalledPlugin) -> dict[str, Any]:
    from prl.compose.checks import unavailable

    provider = record.provider
    return {
        "kind": record.kind,
        "name": provider.name,
        "summary": provider.summary,
        "unavailable": unavailable(provider, plugin),
        "replaces": provider.replaces,
        "imports": {
            part: {"by": IMPORTED_BY[record.kind, part], "reference": reference}
            for part, reference in provider.parts().items()
        },
        "fields": list(_fields(provider.config)),
    }


def _fields(config: type, prefix: str = "") -> Iterator[dict[str, Any]]:
    """Of a section, and of the sections inside it by their dotted names."""
    for field in attrs.fields(config):
        default: Any = field.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = "..." if default.takes_self else default.factory()
        if attrs.has(type(default)):
            yield from _fields(type(default), f"{prefix}{field.alias}.")
        elif field.init:
            yield _field(field, default, prefix)


def _field(field: attrs.Attribute[Any], default: Any, prefix: str) -> dict[str, Any]:
    return {
        "name": f"{prefix}{field.alias}",
        "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
        "default": None if default is attrs.NOTHING else repr(default),
        "help": field.metadata.get("help", ""),
    }


# --- as text ----------------------------------------------------------------------------------------------------------
def _provides(plugin: dict[str, Any]) -> str:
    """`loss dppo, grpo; scheduler synchronous`, then hooks."""
    by_kind: dict[str, list[str]] = {}
    for provider in plugin["provides"]:
        by_kind.setdefault(provider["kind"], []).append(provider["name"])
    parts = [f"{kind} {', '.join(names)}" for kind, names in by_kind.items()]
    return "; ".join([*parts, *plugin["hooks"]])


def _page(plugin: dict[str, Any]) -> str:
    head = [
        ["distribution", f"{plugin['distribution']} {plugin['version']}"],
        ["module", plugin["module"]],
        ["status", plugin["status"]],
    ]
    head += [["hooks", ", ".join(plugin["hooks"])]] if plugin["hooks"] else []
    return "\n\n".join([f"{plugin['name']}\n{columns(head)}", *map(_provider_text, plugin["provides"])])


def _provider_text(provider: dict[str, Any]) -> str:
    imports = [[part, entry["reference"], f"in {entry['by']}"] for part, entry in provider["imports"].items()]
    fields = [["type", f'"{provider["name"]}"', "", ""]]
    for field in provider["fields"]:
        default = "required" if field["default"] is None else f"= {field['default']}"
        fields.append([field["name"], field["type"], default, field["help"]])
    notes = [f"  {provider['unavailable']}\n"] if provider["unavailable"] else []
    return "\n".join(
        [f"{provider['kind']} {provider['name']}: {provider['summary']}", *notes, columns(imports), columns(fields)]
    )
