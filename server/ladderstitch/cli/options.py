"""Command-line options that are generated from the fields of a configuration model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

MAIN_PANEL = "Options"

FieldPath = tuple[str, ...]
"""The names that lead to a field of a nested model."""


def with_config_options(
    model: type[BaseModel],
    *,
    skip: Collection[str] = (),
    panels: Mapping[str, str] | None = None,
    show_defaults: bool = True,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds one option per field of `model` to a command.

    The command's parameter `given` is a dictionary of the options that the user gave, nested like
    the model. Fields in `skip` have no option. A field's `json_schema_extra` may hold `panel`, the
    heading of the option on the help page, and `flags`, the names of the option instead of the
    field's own. `panels` holds the heading of each nested model's fields. `show_defaults` is false
    where an option that is not given leaves the field as it is.
    """
    options = _build_options(model, skip, panels or {}, show_defaults)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        kept = [p for p in own if p.name != "given"]

        def run(**arguments: Any) -> None:
            given: dict[str, Any] = {}
            for parameter, path in options:
                value = arguments.pop(parameter.name)
                if value is not None:
                    _set_nested(given, path, value)
            command(**arguments, given=given)

        parameters = [*kept, *(parameter for parameter, _ in options)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__, run.__name__ = command.__doc__, command.__name__
        return run

    return decorate


def _build_options(
    model: type[BaseModel], skip: Collection[str], panels: Mapping[str, str], show_defaults: bool
) -> list[tuple[inspect.Parameter, FieldPath]]:
    """Return a parameter for each field, and the path of the field."""
    options: list[tuple[inspect.Parameter, FieldPath]] = []
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        nested = field.annotation
        if inspect.isclass(nested) and issubclass(nested, BaseModel):
            panel = panels.get(name, MAIN_PANEL)
            for inner, inner_field in nested.model_fields.items():
                parameter = _build_parameter(inner, inner_field, panel, show_defaults)
                options.append((parameter, (name, inner)))
        else:
            parameter = _build_parameter(name, field, MAIN_PANEL, show_defaults)
            options.append((parameter, (name,)))
    return options


def _build_parameter(
    name: str, field: FieldInfo, panel: str, show_default: bool
) -> inspect.Parameter:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    kind = _option_type(field.annotation)
    default = field.get_default(call_default_factory=True)
    flag = name.replace("_", "-")
    # only an option that is on by default needs a negative form
    own_flag = f"--{flag}/--no-{flag}" if kind is bool and default else f"--{flag}"
    flags = extra.get("flags", [own_flag])
    assert isinstance(flags, list), "names of options"
    option = typer.Option(
        *map(str, flags),
        help=_format_help(
            field.description or name.replace("_", " "), default if show_default else None
        ),
        show_default=False,
        rich_help_panel=str(extra.get("panel", panel)),
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type] # read at run time
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _option_type(annotation: Any) -> Any:
    """Return the type of an option: without None, a list instead of a tuple, text for a union.

    The model checks the text.
    """
    if get_origin(annotation) is Annotated:
        return _option_type(get_args(annotation)[0])
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if type(None) in get_args(annotation):
        return _option_type(kinds[0])
    if get_origin(annotation) in (Union, UnionType):
        return str
    if get_origin(annotation) is tuple:
        kind: Any = _option_type(kinds[0])
        return list[kind]
    return annotation


def _set_nested(given: dict[str, Any], path: FieldPath, value: Any) -> None:
    *outer, last = path
    for name in outer:
        given = given.setdefault(name, {})
    given[last] = value


def _format_help(description: str, default: object) -> str:
    first = description.split()[0].rstrip(":")
    if first.isalpha() and first.islower() and first != "auto":
        description = description[0].upper() + description[1:]
    shown = "" if default is None or default in ("", (), False) else f" (default: {default})"
    return f"{description}{shown}."
