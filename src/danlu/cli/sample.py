"""``danlu sample``: train a small image model, or take a trained one, and draw images with any solver."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from danlu.cli.streams import check_writable, progress_bar

if TYPE_CHECKING:
    from danlu.diffusion.grids import Spacing
    from danlu.training.diffusion_model import ImageModel

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def sample(
    source: Annotated[
        str,
        typer.Argument(
            help="digits (bundled), a recipe (TOML), a folder of images, or the folder of a trained model.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run. Default: runs/ and the name.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="Change a key of the recipe, such as training.steps=500; may be repeated."),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the images of a folder.")] = None,
    resize: Annotated[bool, typer.Option("--resize", help="Bring images of other sizes to --size.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", help="Images to draw.")] = 50,
    classes: Annotated[
        list[str] | None, typer.Option("--class", "-c", help="Class to draw; may be repeated. Default: all in turn.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="1 is none; more is more typical of the class.")] = 1.0,
    solver: Annotated[
        str, typer.Option(help="ddim, ancestral, euler, heun, dpm2, ipndm, dpm++2m, dpm++3m, unipc, ..., or amed.")
    ] = "ddim",
    steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 20,
    spacing: Annotated[
        str | None, typer.Option(help="Of its times: uniform, polynomial, logsnr or time_uniform.")
    ] = None,
    columns: Annotated[int | None, typer.Option(help="Images in a row. Default: one for each class, or 10.")] = None,
    scale: Annotated[int | None, typer.Option(help="Screen pixels for a pixel. Default: images of 64.")] = None,
    plot: Annotated[
        bool, typer.Option("--plot/--no-plot", help="Also compare solvers by calls of the network.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the noise; that of the training is in the recipe.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON instead of a line.")] = False,
) -> None:
    """Draw images: trains a small model of digits or of your folder first, unless --out holds it already.

    Writes the trained model as a pipeline of diffusers, a sheet of samples, and a plot of the error of several solvers.
    Example: danlu sample digits --guidance 2 --out runs/digits
    """
    _check(count=count, steps=steps, columns=columns, scale=scale)
    for package in ("diffusers", "PIL"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'danlu sample needs {package}: pip install "danlu[diffusion]"')
    _check_solver(solver, spacing)
    model, out = _model(source, out, list(settings or ()), size, resize, device)

    from danlu.context.page import as_png
    from danlu.files import replacing, write_whole
    from danlu.training.diffusion_report import COMPARED, draw_errors, sample_images, solver_errors, trained_amed
    from danlu.training.images import grid_image

    amed = trained_amed(model, steps, seed) if solver == "amed" else None
    output, _, noise = sample_images(
        model,
        count,
        classes=classes or (),
        guidance=guidance,
        solver=amed or solver,
        steps=steps,
        spacing=cast("Spacing | None", spacing),
        seed=seed,
    )
    in_turn = len(classes or model.classes)
    columns = columns or (in_turn if 1 < in_turn <= 20 else min(count, 10))
    sheet = grid_image(output.samples, columns, scale or max(1, round(64 / model.shape[1])))
    with replacing(out / "samples.png") as part:
        sheet.save(part, format="PNG")
    summary: dict[str, Any] = {
        "model": str(out / "model") if (out / "model").is_dir() else source,
        "images": count,
        "classes": list(classes or model.classes),
        "guidance": guidance,
        "solver": solver,
        "steps": steps,
        "calls": output.evaluations,
        "seed": seed,
        "samples": str(out / "samples.png"),
    }
    if plot:
        few = noise[:16]
        labels = model.labels(classes or (), count)
        chosen = model.denoiser(None if labels is None else labels[:16], guidance)
        names = list(dict.fromkeys([*COMPARED, *([solver] if _has_an_end(solver) else [])]))
        errors = solver_errors(chosen, few, names, cast("Spacing | None", spacing), amed)
        write_whole(out / "solvers.png", as_png(draw_errors(errors)))
        summary |= {"errors": errors, "plot": str(out / "solvers.png")}
    write_whole(out / "samples.json", json.dumps(summary, indent=1) + "\n")
    if json_output:
        typer.echo(json.dumps(summary, indent=1))
        return
    typer.echo(f"{count} images by {solver}, {output.evaluations} calls of the network: {out / 'samples.png'}")
    if plot:
        typer.echo(f"solvers: {out / 'solvers.png'}")
    typer.echo(f"model: {summary['model']}")


def _check(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")


def _check_solver(solver: str, spacing: str | None) -> None:
    """Before minutes of training."""
    from danlu.diffusion.grids import SPACINGS
    from danlu.diffusion.solvers import SOLVERS

    if solver != "amed" and solver not in SOLVERS:
        raise ValueError(f"--solver must be amed or one of {', '.join(SOLVERS)}, got {solver!r}")
    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(f"--spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if solver == "amed" and spacing is not None:
        raise ValueError("--spacing must be left out for --solver amed, which learns its times")


def _has_an_end(solver: str) -> bool:
    """Whether the solver ends where the ODE does: some draw noise, and amed is trained for one budget."""
    return solver not in ("ancestral", "euler-maruyama", "amed")


def _model(
    source: str, out: Path | None, settings: list[str], size: int | None, resize: bool, device: str
) -> tuple[ImageModel, Path]:
    """The trained model, and the folder that everything goes to."""
    from danlu.training.image_tables import DIGITS

    path = Path(source)
    pipeline = next((place for place in (path, path / "model") if (place / "model_index.json").is_file()), None)
    given = [*settings, *([f"data.size={size}"] if size is not None else []), *(["data.resize=true"] if resize else [])]
    if pipeline is not None:
        if given:
            raise ValueError(f"{source} is trained already: --set, --size and --resize are for training")
        out = out or (path if pipeline != path else Path("runs") / f"{path.name}-samples")
    elif source != DIGITS and not path.exists():
        raise ValueError(f"{source} is no file or folder, and not {DIGITS!r}")
    else:
        out = out or Path("runs") / (path.stem if path.is_file() or source == DIGITS else path.absolute().name)
    check_writable(out, folder_wanted=True)

    from danlu.hosts.loading import find_device
    from danlu.training.diffusion import trained_image_model
    from danlu.training.diffusion_model import ImageModel
    from danlu.training.image_tables import folder_recipe, load_image_recipe

    place = find_device(device)
    if pipeline is not None:
        return ImageModel.load(pipeline, place), out
    recipe = folder_recipe(path, given) if path.is_dir() and source != DIGITS else load_image_recipe(source, given)
    try:
        with progress_bar() as progress:
            return trained_image_model(recipe, out, place, progress), out
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on from the last checkpoint in {out}", err=True)
        raise typer.Exit(130) from None
