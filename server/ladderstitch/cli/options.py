"""Command-line options made from a configuration model: names, types, defaults and help once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

MAIN_PANEL = "Options"


def with_config_options(
    model: type[BaseModel], *, skip: Collection[str] = (), panels: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that gives a command one option per field of `model`.

    The command gets the options that were given as a dictionary in its parameter `given`, nested
    as the model is; fields in `skip` have no option. A field's `json_schema_extra` may hold
    `panel`, the heading of the help page that it belongs to, and `flags`, names to use instead of
    the field's own; `panels` names the heading of each nested model's fields.
    """
    paths = dict(_options(model, skip, panels or {}))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        kept = [p for p in own if p.name != "given"]

        def run(**arguments: Any) -> None:
            given: dict[str, Any] = {}
            for name, (path, _) in paths.items():
                value = arguments.pop(name)
                if value is not None:
                    _put(given, path, value)
            command(**arguments, given=given)

        options = [parameter for _, parameter in paths.values()]
        run.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*kept, *options)}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


Path = tuple[str, ...]


def _options(
    model: type[BaseModel], skip: Collection[str], panels: Mapping[str, str]
) -> list[tuple[str, tuple[Path, inspect.Parameter]]]:
    found: list[tuple[str, tuple[Path, inspect.Parameter]]] = []
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        nested = field.annotation
        if inspect.isclass(nested) and issubclass(nested, BaseModel):
            panel = panels.get(name, MAIN_PANEL)
            for inner, inner_field in nested.model_fields.items():
                parameter = _parameter(inner, inner_field, panel)
                found.append((inner, ((name, inner), parameter)))
        else:
            found.append((name, ((name,), _parameter(name, field, MAIN_PANEL))))
    return found


def _parameter(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    flag = "--" + name.replace("_", "-")
    kind = _plain(field.annotation)
    flags = extra.get("flags", [f"{flag}/--no-{flag[2:]}" if kind is bool else flag])
    assert isinstance(flags, list), "names of options"
    default = field.get_default(call_default_factory=True)
    option = typer.Option(
        *map(str, flags),
        help=_help(field.description or name.replace("_", " "), default),
        show_default=False,
        rich_help_panel=str(extra.get("panel", panel)),
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type] # read at run time
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _plain(annotation: Any) -> Any:
    """Return the type without None; a tuple of one kind is given as a list."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if type(None) in get_args(annotation):
        return _plain(kinds[0])
    if get_origin(annotation) is tuple:
        return list[kinds[0]]  # type: ignore[valid-type] # typer reads it at run time
    return annotation


def _put(given: dict[str, Any], path: Path, value: Any) -> None:
    *outer, last = path
    for name in outer:
        given = given.setdefault(name, {})
    given[last] = value


def _help(description: str, default: object) -> str:
    first = description.split()[0]
    if first.isalpha() and first.islower() and first != "auto":
        description = description[0].upper() + description[1:]
    shown = "" if default is None or default in ("", (), False) else f" (default: {default})"
    return f"{description}{shown}."
