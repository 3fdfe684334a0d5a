"""`detox-ray lab`: build and remove the offline lab."""

import typer

lab = typer.Typer(help="The offline lab: a small world without downloads.", no_args_is_help=True)


@lab.command("build")
def lab_build() -> None:
    """Build the lab now instead of on first use."""
    from detox_ray.data.lab import build_lab
    from detox_ray.terminal import Terminal

    terminal = Terminal()
    with terminal.bar("building the offline lab", total=1) as progress:
        folder = build_lab(progress=lambda _, share: progress(share))
    terminal.stage(f"the lab is in {folder}")


@lab.command("remove")
def lab_remove() -> None:
    """Remove the lab's files."""
    from detox_ray.data.lab import remove_lab

    typer.echo("removed" if remove_lab() else "there is none")
