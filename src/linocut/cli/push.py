"""`linocut push`: a model folder onto the Hugging Face hub, with a model card."""

from __future__ import annotations

import json
from pathlib import Path

import click

from linocut.cli import printable

_SHOWN = 8


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--private", is_flag=True, help="If the repository is made now, let nobody else see it.")
@click.option("--base-model", metavar="ORG/NAME", default="",
              help="The model that this one was made from. Default: what the folder says.")
@click.option("--license", metavar="ID", default="",
              help="Licence, as the hub calls it (apache-2.0, mit, ...). Default: that of the LICENSE file.")
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE",
              help="Scores for the card: report.json of 'linocut eval', or the folder of a run.")
@click.option("--card", type=click.Path(path_type=Path), metavar="FILE", help="The card, instead of a written one.")
@click.option("--replace-card", is_flag=True, help="Write a new card over one that was edited.")
@click.option("--card-only", is_flag=True, help="Print the card and do nothing else.")
@click.option("--dry-run", is_flag=True, help="Check the model and print what would be uploaded; no network.")
@click.option("-m", "--message", metavar="TEXT", default="", help="Message of the commit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(folder: Path, repository: str, private: bool, base_model: str, license: str, report: Path | None,
            card: Path | None, replace_card: bool, card_only: bool, dry_run: bool, message: str,
            as_json: bool) -> None:
    """Put the model folder DIR on the Hugging Face hub as REPO (org/name), in one commit.

    Every tensor is checked first. Log in before with 'hf auth login', or set HF_TOKEN. A card is written from what is
    in the files; one that you edited, here or there, is never replaced without --card or --replace-card.

    \b
    linocut push klein-ternary me/klein-ternary --base-model black-forest-labs/FLUX.2-klein-4B
    linocut push klein-ternary me/klein-ternary --card-only > card.md
    """
    from linocut.integrations.card import read_report
    from linocut.integrations.publish import prepare, publish

    scores = None if report is None else read_report(report)
    upload = prepare(folder.expanduser(), repository, card=card, replace_card=replace_card, report=scores,
                     base_model=base_model, license=license, verify=not card_only)
    if card_only:
        click.echo(upload.card, nl=False)
        return
    facts = upload.to_dict() | {"dry_run": dry_run}
    if not as_json:
        for line in _lines(facts):
            click.echo(printable(line))
        for name, value, option in (("base model", upload.facts.base_model, "--base-model"),
                                    ("licence", upload.facts.license, "--license")):
            if not value and card is None:
                click.echo(f"the card names no {name}; {option} does", err=True)
    if not dry_run:
        facts |= publish(upload, given_card=card is not None, replace_card=replace_card, private=private,
                         message=message)
    if as_json:
        click.echo(json.dumps(facts | {"card": upload.card}, indent=2))
    elif dry_run:
        click.echo(f"\n{upload.card}", nl=False)
    else:
        also = facts["also_there"]
        if also:
            click.echo(printable(f"left alone there: {', '.join(also[:_SHOWN])}"
                                 + (f" and {len(also) - _SHOWN} more" if len(also) > _SHOWN else "")))
        click.echo(printable(f"{facts['url']} (commit {facts['commit'][:10]})"))


def _lines(facts: dict[str, object]) -> list[str]:
    files = facts["files"]
    assert isinstance(files, dict)
    left_out = facts["left_out"]
    assert isinstance(left_out, list)
    lines = [f"verified {facts['verified_tensors']:,} tensors", f"to {facts['repository']}:"]
    lines += [f"  {size:>15,}  {name}" for name, size in files.items()]
    lines.append(f"  {facts['bytes']:>15,}  bytes in all")
    if left_out:
        lines.append(f"not taken along: {', '.join(left_out[:_SHOWN])}"
                     + (f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""))
    return lines
