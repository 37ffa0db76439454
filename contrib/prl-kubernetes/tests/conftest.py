"""What of an object a published schema (OpenAPI v3, as a CustomResourceDefinition has it) does not allow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Schema = dict[str, Any]
JOBSET: Schema = json.loads((Path(__file__).parent / "schemas/jobset.json").read_text())
JOB: Schema = JOBSET["properties"]["spec"]["properties"]["replicatedJobs"]["items"]["properties"]["template"]
"""A JobSet's template of a Job is Kubernetes' own (batch/v1)."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def problems(value: Any, schema: Schema, path: str = "") -> list[str]:
    """One sentence per violation; a field that the schema does not know is one."""
    return list(_problems(value, schema, path))


def _problems(value: Any, schema: Schema, path: str) -> Iterator[str]:
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{path}: {value!r} is neither a number nor a string"
    elif "type" in schema and (not isinstance(value, _TYPES[schema["type"]]) or _is_stray_bool(value, schema)):
        yield f"{path}: {value!r} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        yield f"{path}: {value!r} does not match {schema['pattern']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{path}: {value!r} is below {schema['minimum']}"
    if isinstance(value, dict):
        yield from _of_object(value, schema, path)
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, schema["items"], f"{path}[{index}]")


def _is_stray_bool(value: Any, schema: Schema) -> bool:
    return isinstance(value, bool) and schema["type"] != "boolean"


def _of_object(value: dict[str, Any], schema: Schema, path: str) -> Iterator[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path}.{name}: is missing"
    free = not known and others is None  # such as metadata, of which a CustomResourceDefinition says no more
    for name, item in value.items():
        if name in known or others is not None:
            yield from _problems(item, known.get(name, others), f"{path}.{name}")
        elif not free:
            yield f"{path}.{name}: the schema knows no such field"


@pytest.fixture
def jobset_problems() -> Callable[[Any], list[str]]:
    """What the schema of a JobSet does not allow in an object."""
    return lambda value: problems(value, JOBSET)


@pytest.fixture
def job_problems() -> Callable[[Any], list[str]]:
    """What the schema of a Job's metadata and spec does not allow."""
    return lambda value: problems(value, JOB)
