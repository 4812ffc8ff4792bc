"""`npvlm inspect`."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="One JSON object with everything.")
def inspect(model: str, as_json: bool) -> int:
    """Say what MODEL is and holds, also where it cannot be loaded.

    MODEL is a bundled model, a folder, or an .npz file of big_vision. Family, sizes, files, tensors
    that are missing, unexpected or misshapen, tokenizer, the memory that each precision takes, and
    what it was likely trained for. No weight is read. Of an adapter: what it changes, its rank and
    its base.

    \b
    npvlm inspect shapes
    npvlm inspect paligemma-3b-mix-224 --json

    Exit codes: 0 it would load, 1 it would not (and why), 3 there is no such folder.
    """
    from npvlm.files.adapters import is_adapter
    from npvlm.opening import find_place
    from npvlm.work.inspect import inspect as run
    from npvlm.work.inspect_adapter import adapter_page, inspect_adapter
    from npvlm.work.inspect_page import page

    if is_adapter(place := find_place(model)):
        beside = inspect_adapter(place)
        click.echo(json.dumps(beside.to_dict()) if as_json else adapter_page(beside))
        return 0 if beside.refusal is None else 1
    found = run(model)
    click.echo(json.dumps(found.to_dict(), allow_nan=False) if as_json else page(found))
    return 0 if found.refusal is None else 1
