"""A registry maps a name to the function or class that builds a brick: an encoder, a loss, a reader."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from sista_pl.errors import SistaError, did_you_mean

T = TypeVar("T", bound=Callable[..., Any])
Spec = str | Mapping[str, Any]


class Registry:
    """Builders by name; a spec in YAML is `name` or `{name: …, argument: …}`.

    Args:
        kind: what is registered, in the singular ("loss"); it opens each error message.
        fallback: builds names that are not registered, as `fallback(name, **arguments)`: any timm or
            Hugging Face model is addressed so. Without one an unknown name is an error.
    """

    def __init__(self, kind: str, fallback: Callable[..., Any] | None = None):
        self.kind = kind
        self.fallback = fallback
        self._builders: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a class or function so that `name` builds it; the same name twice is an error."""

        def add(builder: T) -> T:
            if name in self._builders:
                other = self._builders[name]
                raise SistaError(
                    f"{self.kind} {name!r}: already registered by {other.__module__}.{other.__qualname__}; "
                    f"choose another name for {builder.__module__}.{builder.__qualname__}"
                )
            self._builders[name] = builder
            return builder

        return add

    def build(self, spec: Spec, **context: Any) -> Any:
        """Build the brick that `spec` names.

        Args:
            spec: a name, or a mapping with `name` and the builder's arguments.
            context: what the caller knows and the YAML does not (a dimension, say); passed on only where the
                builder's signature takes it, and never over a value that the spec gives.

        Raises:
            SistaError: unknown name, unknown or missing argument.
        """
        name, arguments = self.split(spec)
        if name in self._builders:
            builder = self._builders[name]
        elif self.fallback is not None:
            builder, arguments = self.fallback, {"name": name, **arguments}
        else:
            raise SistaError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self)}")
        signature = inspect.signature(builder)
        takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        for key, value in context.items():
            if key in signature.parameters or takes_any:
                arguments.setdefault(key, value)
        for key in arguments:
            if key not in signature.parameters and not takes_any:
                keys = [p for p in signature.parameters if p != "name"]
                raise SistaError(f"{self.kind} {name!r} has no argument {key!r}; {did_you_mean(key, keys)}")
        try:
            signature.bind(**arguments)
        except TypeError as why:
            raise SistaError(f"{self.kind} {name!r}: {why}; see `sista list`") from None
        return builder(**arguments)

    def split(self, spec: Spec) -> tuple[str, dict[str, Any]]:
        """Return name and arguments of a spec."""
        if isinstance(spec, str):
            return spec, {}
        arguments = {str(k): v for k, v in dict(spec).items()}
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            raise SistaError(f"{self.kind} without a name: {dict(spec)}; write `name: …`, known: {', '.join(self)}")
        return name, arguments

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._builders:
            raise SistaError(f"unknown {self.kind} {name!r}; {did_you_mean(name, self)}")
        return self._builders[name]

    def __contains__(self, name: object) -> bool:
        return name in self._builders

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._builders))

    def __len__(self) -> int:
        return len(self._builders)
