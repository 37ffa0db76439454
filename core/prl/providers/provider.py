"""The record that every kind of provider is. See `prl.providers`."""

from __future__ import annotations

from typing import Any, TypeAlias

import attrs

Ref: TypeAlias = str
"""`"package.module:attribute"`, imported lazily."""


def option(default: Any = attrs.NOTHING, *, help: str, **kwargs: Any) -> Any:
    """A field of a config section with the sentence `prl plugins show` prints for it.

    Example:
        >>> @attrs.frozen(kw_only=True)
        ... class CispoConfig(LossConfig):
        ...     clip_high: float = option(5.0, help="upper bound of the detached importance ratio")
    """
    return attrs.field(default=default, metadata={"help": help}, **kwargs)


@attrs.frozen(kw_only=True)
class Provider:
    """A named choice for a config section."""

    name: str
    """The `type` that chooses it."""
    config: type
    """attrs class of the section, a subclass of the kind's `...Config` base in `prl.compose.config`."""
    summary: str
    """One line for `prl plugins`."""
    requires: tuple[str, ...] = ()
    """Import names that must be installed where the run is; probed without importing."""
    replaces: str | None = None
    """`"plugin:name"` of a provider this one deliberately takes over."""

    def parts(self) -> dict[str, Ref]:
        """The fields that name a part, `build` and its like: field -> reference; without those that are left empty."""
        named = {f.name: getattr(self, f.name) for f in attrs.fields(type(self)) if f.type in ("Ref", "Ref | None")}
        return {name: reference for name, reference in named.items() if reference}
