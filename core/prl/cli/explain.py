"""`prl explain [RUN] --step N`: what a step was trained on, rollout by rollout, and what was left out before it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from prl.cli.runs import add_run_argument, find_run
from prl.cli.table import columns

_SHOWN = ("loss/", "mismatch/", "reward/", "grad_norm", "learning_rate", "entropy", "length/", "time/step")
"""Metrics that are printed; --json has all."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser("explain", help="what a step was made of", description=__doc__)
    add_run_argument(parser)
    parser.add_argument("--step", type=int, metavar="N", help="by default the newest")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from prl.ledger.explain import explain

    found = explain(find_run(arguments.directory), arguments.step)
    print(json.dumps(found, indent=1) if arguments.json else page(found))
    return 0


def page(step: Mapping[str, Any]) -> str:
    """A step as text."""
    parts = [f"step {step['step']} ({step['phase']}): {step['state']}\n{columns(list(_head(step)))}"]
    metrics = [[name, f"{value:.4g}"] for name, value in step["metrics"].items() if name.startswith(_SHOWN)]
    if metrics:
        parts.append(f"what came of it\n{columns(metrics)}")
    parts.append(f"made of\n{columns([_GROUP_HEAD, *_rows(step)])}")
    parts += list(_excluded(step["excluded"]))
    return "\n\n".join(parts)


def _head(step: Mapping[str, Any]) -> Iterator[list[str]]:
    for role, version in step["weights"].items():
        yield [f"version {role}", _version(version)]
    yield ["tokens", f"{step['tokens']:,}, {step['sampled']:,} of them sampled"]
    yield ["streams", ", ".join(f"{stream} {count:,} tokens" for stream, count in step["streams"].items())]
    if step["staleness"]:
        yield ["staleness", ", ".join(f"{tokens:,} tokens at {age}" for age, tokens in step["staleness"].items())]
    yield ["batch", step["digest"][:16]]
    if step["undone"]:
        yield ["done before", f"by launch {', '.join(map(str, step['undone']))}, and undone"]


def _version(version: Mapping[str, Any] | None) -> str:
    if version is None:
        return "none yet"
    served = version["served_after"]
    after = f", served after {served:.2f} s" if served is not None else ""
    return (
        f"{version['version']}, chain {version['chain'][:16]}, {'' if version['published'] else 'not '}published{after}"
    )


_GROUP_HEAD = ["GROUP", "TASK", "ATTEMPT", "ENGINE", "MEMBER", "LENGTH", "REWARD", "ADVANTAGE", "VERSIONS", "STALENESS"]


def _rows(step: Mapping[str, Any]) -> Iterator[list[str]]:
    """One per rollout; a warm-up's groups are single tasks without rollouts."""
    for group in step["groups"]:
        head = [group["group_id"], f"{group['environment']} {group['task']}", group["attempt"], group["engine"]]
        for rollout in group["rollouts"] or [{}]:
            names = ("member", "length", "reward", "advantage", "versions", "staleness")
            yield [_cell(value) for value in (*head, *(rollout.get(name) for name in names))]


def _excluded(excluded: Mapping[str, Any]) -> Iterator[str]:
    rows = [_left_out(group) for group in excluded["groups"]]
    yield f"left out since the step before\n{columns(rows)}" if rows else "left out since the step before: nothing"
    failures = [
        [failure["who"], failure["place"], failure["sentence"], failure["done"]] for failure in excluded["failures"]
    ]
    if failures:
        yield f"failures since the step before\n{columns(failures)}"


def _left_out(group: Mapping[str, Any]) -> list[str]:
    task = f"{group['environment']} {group['task']}"
    done = "issued again" if group["again"] else "given up"
    return [f"group {group['group_id']}", f"attempt {group['attempt']}", task, group["reason"], done, _known(group)]


def _known(group: Mapping[str, Any]) -> str:
    if not group["rollouts"]:
        return "" if group["seconds"] is None else f"in flight for {group['seconds']:.1f} s"
    return f"mean length {group['length']:.4g}, mean reward {_cell(group['reward'])}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
