"""The command `schedule`, which shows or changes the scheduling of a running server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ladderstitch.addresses import DEFAULT_ADDRESS
from ladderstitch.cli.console import Address, Json, connect, err, exit_on_failure, out
from ladderstitch.cli.options import with_config_options
from ladderstitch.cli.output import print_fields, print_json
from ladderstitch.scheduling.settings import SchedulerSettings


@with_config_options(SchedulerSettings, skip=("pinned_variant",), show_defaults=False)
def schedule(
    context: typer.Context,
    given: dict[str, Any],
    pin: Annotated[
        int | None, typer.Option(help="Id of a variant that overrides the policy.")
    ] = None,
    unpin: Annotated[bool, typer.Option("--unpin", help="Remove the pinned variant.")] = False,
    model: Annotated[
        str,
        typer.Option(help="Model whose variants are meant (default: the server's only one)."),
    ] = "",
    as_json: Json = False,
    address: Address = DEFAULT_ADDRESS,
) -> None:
    """Show or change the scheduling of a running server.

    Changes apply to all models and all replicas of a deployment, from the next batch on.
    `--fixed-variant` implies the policy `fixed`.
    """
    from ladderstitch.client import scheduling_settings

    if "fixed_variant" in given:
        given.setdefault("policy", "fixed")
    with exit_on_failure(address), connect(context, address) as client:
        if given or unpin or pin is not None:
            scheduling = client.update_scheduling(model, **given, pinned_variant=pin, unpin=unpin)
        else:
            scheduling = client.get_scheduling(model)
    settings, unfit = scheduling_settings(scheduling), list(scheduling.unfit_models)
    if as_json:
        print_json({"settings": settings, "unfit_models": unfit})
    elif out.is_terminal:
        for name, value in settings.items():
            out.print(f"{name}: {'-' if value is None else value}", highlight=False)
    else:
        print_fields([{"setting": name, "value": value} for name, value in settings.items()])
    if unfit:
        names = ", ".join(unfit)
        err.print(f"these settings do not fit {names}: the last ones that did apply there")
