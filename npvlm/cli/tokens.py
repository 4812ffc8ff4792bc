"""`npvlm tokens`."""

from __future__ import annotations

import json

import click

from npvlm.cli.options import model_option, named_model, quiet_option


@click.command()
@click.argument("prompt")
@model_option
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Pictures in front of the prompt.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: ids and pieces.")
@quiet_option
def tokens(prompt: str, model: str | None, images: int, as_json: bool, quiet: bool) -> None:
    """Show what the decoder reads for PROMPT: every place, its id and its piece.

    Of the model only its config and tokenizer are needed.

    \b
    npvlm tokens "detect cat ; dog" --model paligemma-3b-mix-224
    """
    from npvlm.answers.lines import json_line
    from npvlm.decoding.prompt import layout
    from npvlm.opening import find_place, read_vocabulary

    config, tokenizer = read_vocabulary(find_place(named_model(model, quiet)))
    text, removed = tokenizer.strip_image_marks(prompt)
    if removed and not quiet:
        note = f"npvlm: {removed} <image> removed from the prompt; pictures go first anyway."
        click.echo(note, err=True)
    count = images * config.vision_config.num_patches
    ids = layout(tokenizer, text, count).tolist()
    if as_json:
        pieces = [tokenizer.piece(token) for token in ids]
        click.echo(json_line({"ids": ids, "pieces": pieces}))
        return
    pictures = "picture" if images == 1 else f"{images} pictures"
    click.echo(f"{f'0-{count - 1}':>9}  {ids[0]:>7}  <image>  ({count} tokens of the {pictures})")
    for place, token in enumerate(ids[count:], count):
        piece = json.dumps(tokenizer.piece(token), ensure_ascii=False)[1:-1]
        click.echo(f"{place:>9}  {token:>7}  {piece}")
