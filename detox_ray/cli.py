"""The commands; each calls one function. An error of ours is one line, and exit code 2."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from detox_ray.config_file import dump_config, load_config, read_tree
from detox_ray.config_section import Section
from detox_ray.errors import ConfigError, DetoxError, first_line, storage_error
from detox_ray.lab_commands import lab
from detox_ray.meter_config import load_scorers
from detox_ray.run_folder import check_usable

app = typer.Typer(
    help="Make a language model less toxic, and prove it.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.add_typer(lab, name="lab")

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")

ConfigPath = Annotated[Path, typer.Argument(help="YAML file, such as configs/laptop.yaml")]
INTERRUPTED = 130  # the exit code that Typer makes of Ctrl-C
LARGEST_SEED = 2**31 - 1
CalibrationMethod = Literal["auto", "none", "temperature", "isotonic"]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted overrides, such as ppo.learning_rate=1e-4")]
ScorersPath = Annotated[
    Path | None, typer.Option(help="YAML file of the service, an evaluation or a run; none: the embedded service")
]
RunPath = Annotated[Path, typer.Argument(help="run folder, such as runs/demo")]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, evaluate before and after, and write the report; continues a run that was stopped."""
    settings = load_config(config, overrides or [])
    check_usable(settings.run_dir)  # before libraries are loaded, which takes ten seconds
    with _loading():
        from detox_ray import loop

    loop.train(settings)


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune on prompts and responses, keep the adapter of the lowest dev loss; continues a run that was stopped."""
    with _loading():
        from detox_ray.sft import fine_tune
        from detox_ray.sft_config import load_sft_config

    fine_tune(load_sft_config(config, overrides or []))


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(help="YAML file, run folder, file of responses, model folder or hub id")],
    overrides: Overrides = None,
) -> None:
    """Measure how toxic and how fluent systems are, side by side; continues an evaluation that was stopped."""
    with _loading():
        from detox_ray import measurement

    measurement.evaluate(target, overrides or [])


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="run or evaluation folders; the first one's base counts")],
    output: Annotated[Path, typer.Option(help="folder of the comparison")] = Path("runs/comparison"),
) -> None:
    """Put systems that were evaluated on the same prompts side by side; needs no model."""
    from detox_ray.evaluation.report import write_report
    from detox_ray.evaluation.side_by_side import compare_folders
    from detox_ray.evaluation.summary import evaluation_table

    Console().print(evaluation_table(compare_folders(folders, output)))
    typer.echo(write_report(output))


@app.command()
def analyze(
    folder: RunPath,
    relevance_model: Annotated[str | None, typer.Option(help="sentence encoder, folder or hub id")] = None,
    relevance_revision: Annotated[str | None, typer.Option(help="its commit or tag, when it is a hub id")] = None,
) -> None:
    """Say what changed inside the tuned model, and show it in the report; needs the extra `analysis`."""
    with _loading():
        from detox_ray.evaluation import analysis
    from detox_ray.evaluation.report import write_report
    from detox_ray.terminal import Terminal

    with Terminal().bar("analysing", total=1) as bar:
        analysis.analyze(
            folder,
            relevance_model=relevance_model,
            relevance_revision=relevance_revision,
            progress=lambda _, share: bar(share),
        )
    typer.echo(write_report(folder))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="run or evaluation folder, such as runs/demo")]) -> None:
    """Write report.html, report.md and model_card.md again from what is in the folder; needs no model."""
    from detox_ray.evaluation.report import write_report

    typer.echo(write_report(folder))


@app.command()
def watch(
    folder: RunPath, once: Annotated[bool, typer.Option("--once", help="print it once and end, as into a pipe")] = False
) -> None:
    """Show a run while it goes on, from another terminal: steps, curves, where the time goes, lost workers."""
    from detox_ray.watch import watch as show

    show(folder, once)


@app.command()
def timeline(
    folder: RunPath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file; none: RUN/timeline.json")] = None,
) -> None:
    """Write where each step's time went as a Chrome trace, for chrome://tracing or ui.perfetto.dev."""
    from detox_ray.timeline import write_timeline

    typer.echo(write_timeline(folder, output))


@app.command()
def chat(
    folder: RunPath,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="of the first answers; then one more each time")
    ] = 0,
) -> None:
    """Talk to a run's base, fine-tuned and tuned model side by side in the terminal."""
    with _loading():
        from detox_ray.chat import chat as talk

    talk(folder, seed)


@app.command()
def export(
    folder: RunPath,
    output: Annotated[Path | None, typer.Option(help="empty folder to write; none: RUN/export")] = None,
    form: Annotated[Literal["merged", "adapter"], typer.Option(help="a whole model, or the LoRA adapter")] = "merged",
    base: Annotated[
        Literal["trained", "original"],
        typer.Option(help="merge into the weights it was trained and measured on, or into the published ones"),
    ] = "trained",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: that of the published weights")
    ] = "auto",
    push_to_hub: Annotated[str | None, typer.Option(help="also upload it to this repository, owner/name")] = None,
    public: Annotated[bool, typer.Option(help="a repository that is made is public")] = False,
) -> None:
    """Write the trained model for others: safetensors, tokenizer, generation settings and a model card."""
    with _loading():
        from detox_ray import export as exporting

    written = exporting.export(folder, output or folder / "export", form, base, dtype, push_to_hub)
    typer.echo(written)
    if push_to_hub is not None:
        typer.echo(exporting.push_to_hub(written, push_to_hub, public))


@app.command()
def score(
    texts: Annotated[list[str], typer.Argument(help="texts; - for the lines of standard input; with --output a file")],
    config: ScorersPath = None,
    output: Annotated[Path | None, typer.Option(help="score the file named instead of texts into this folder")] = None,
    text_column: Annotated[str, typer.Option(help="of the file")] = "text",
    workers: Annotated[int | None, typer.Option(min=1, help="processes that score the file; none: one per CPU")] = None,
) -> None:
    """Print the toxicity of texts, a JSON object per line; or score a large file on Ray Data (resumable)."""
    found = load_scorers(config)
    from detox_ray.data.lab import resolve_lab

    scorers = resolve_lab(found).scorers
    if output is not None:
        from detox_ray.scoring.score_file import score_file

        if len(texts) != 1:
            raise ConfigError(f"{len(texts)} files for one --output: give one")
        score_file(texts[0], output, scorers, text_column, workers)
        return
    if len(texts) == 1 and Path(texts[0]).suffix in TABLE_SUFFIXES and Path(texts[0]).is_file():
        raise ConfigError(f"{texts[0]} is a file: say where its scores go with --output FOLDER")
    from detox_ray.rewards.classifiers import score_texts

    lines = [line.rstrip("\n") for line in sys.stdin] if texts == ["-"] else texts
    for line in score_texts(scorers, lines):
        typer.echo(json.dumps({name: round(value, 4) for name, value in line.items()}))


@app.command()
def audit(
    cases: Annotated[Path, typer.Argument(help="labelled cases: HateCheck's CSV, or any CSV, JSONL or Parquet file")],
    config: ScorersPath = None,
    output: Annotated[Path, typer.Option(help="folder of the audit")] = Path("runs/audit"),
    text_column: Annotated[str, typer.Option(help="with the text")] = "test_case",
    label_column: Annotated[str, typer.Option(help="with the label")] = "label_gold",
    group_column: Annotated[str, typer.Option(help="with the group that the text is about")] = "target_ident",
    toxic_label: Annotated[list[str] | None, typer.Option(help="means toxic; may be repeated")] = None,
    nontoxic_label: Annotated[list[str] | None, typer.Option(help="means not toxic; may be repeated")] = None,
    generations: Annotated[Path | None, typer.Option(help="generations.parquet whose prompts name groups")] = None,
) -> None:
    """Audit scorers for bias: how often they are wrong, by group, and whether naming a group is enough."""
    from detox_ray.data.cases import CaseColumns, CaseLabels
    from detox_ray.data.lab import resolve_lab
    from detox_ray.evaluation.audit import run_audit
    from detox_ray.evaluation.audit_report import audit_table
    from detox_ray.terminal import Terminal

    columns = CaseColumns(text_column, label_column, group_column)
    labels = CaseLabels(toxic_label or CaseLabels.toxic, nontoxic_label or CaseLabels.nontoxic)
    scorers = resolve_lab(load_scorers(config)).scorers
    with Terminal().bar("auditing", total=1) as bar:
        found = run_audit(
            cases, scorers, output, columns, labels, generations, progress=lambda _, done, of: bar(done / of)
        )
    Console().print(audit_table(found))
    typer.echo(output / "audit.html")


@app.command()
def calibrate(
    file: Annotated[Path, typer.Argument(help="texts with labels or scores: CSV, TSV, JSONL or Parquet")],
    labels: Annotated[
        list[str] | None, typer.Option(help="TOXICITY=column with 0 and 1, or probabilities; may be repeated")
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="TOXICITY=column with another's scores to compare with; may be repeated")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the service; none: the embedded service")] = None,
    output: Annotated[Path, typer.Option(help="folder of the table and its report")] = Path("runs/calibration"),
    text_column: Annotated[str, typer.Option(help="a field of an object is object.field")] = "text",
    method: Annotated[CalibrationMethod, typer.Option(help="auto: the simplest that no other reliably beats")] = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="chooses the texts that are fitted; the others are measured")
    ] = 0,
) -> None:
    """Fit the scoring service's probabilities to labelled texts, and say what they are worth before and after."""
    from detox_ray import calibration
    from detox_ray.evaluation.calibration_report import calibration_tables
    from detox_ray.serving.api_config import load_api_config
    from detox_ray.terminal import Terminal

    columns = calibration.CalibrationColumns(
        text_column,
        calibration.named_columns(labels or [], "--labels"),
        calibration.named_columns(reference or [], "--reference"),
    )
    service = load_api_config(config, calibrated=False)
    with Terminal().bar("reading", total=1) as bar:
        found = calibration.calibrate(
            file, service, output, columns, method, seed, progress=lambda _, done, of: bar(done / of)
        )
    Console().print(*calibration_tables(found), sep="\n")
    typer.echo(output / "calibration.html")


@app.command()
def serve(
    config: Annotated[Path | None, typer.Argument(help="YAML file; none: the embedded service, offline")] = None,
    overrides: Overrides = None,
) -> None:
    """Serve toxicity scores over HTTP, also in Perspective's and OpenAI's formats."""
    from detox_ray.serving.api_config import load_api_config
    from detox_ray.serving.serve_api import serve_api

    changes = overrides or []
    if config is not None and "=" in str(config) and not config.is_file():
        config, changes = None, [str(config), *changes]
    serve_api(load_api_config(config, changes), on_ready=lambda address: typer.echo(f"{address}/docs"))


@app.command()
def playground(
    run: RunPath,
    prompts: Annotated[
        Path | None, typer.Option(help="file of prompts to offer; none: the run's held-out ones")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="of that file; none: as in the run")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; others than you reach it on 0.0.0.0")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 7860,
) -> None:
    """Compare a run's base and adapters in the browser, side by side; needs the extra `playground`."""
    from detox_ray.playground import playground as serve_playground

    serve_playground(run, prompts, text_column, host, port)


@app.command()
def config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration of a run, an evaluation or the scoring service."""
    from detox_ray.meter_config import meter_config
    from detox_ray.serving.api_config import is_of_service, load_api_config
    from detox_ray.sft_config import load_run_config

    given = overrides or []
    tree = read_tree(config, given)
    if "systems" in tree:
        resolved: Section = meter_config(config, given)
    elif is_of_service(tree):
        resolved = load_api_config(config, given)
    else:
        resolved = load_run_config(config, given)
    typer.echo(dump_config(resolved), nl=False)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=0, help="of one GPU; none: that of the GPU here")] = None,
) -> None:
    """Say what a run needs of memory and of Ray, by role, and refuse one that cannot fit; loads nothing."""
    with _loading():
        from detox_ray import memory_plan
        from detox_ray.data.lab import resolve_lab
        from detox_ray.placement import learner_placement, placement_table, placements
        from detox_ray.sft_config import SFTConfig, load_run_config
        from detox_ray.tuning_memory import plan_tuning_memory

    settings = resolve_lab(load_run_config(config, overrides or []))
    if isinstance(settings, SFTConfig):
        planned, needed = plan_tuning_memory(settings), [learner_placement(settings.train)]
    else:
        planned, needed = memory_plan.plan_memory(settings), placements(settings)
    Console().print(memory_plan.memory_table(planned), placement_table(needed))
    memory_plan.check_memory(planned, *memory_plan.available_memory(planned, settings.ray, gpu_memory_gib))


@app.command()
def doctor() -> None:
    """Say what this machine can run and what is missing."""
    from detox_ray.doctor import diagnose

    Console().print(diagnose())


def main() -> None:
    """Entry point of `detox-ray`."""
    try:
        status = app(standalone_mode=False) or 0
        if status == INTERRUPTED:
            Console(stderr=True).print("stopped; a run that was under way continues with the same command")
        sys.exit(status)
    except typer.TyperException as error:
        # Wrong options; for a command without its arguments the message is the help.
        typer.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(INTERRUPTED)
    except DetoxError as error:
        _print_error(error)
        sys.exit(2)
    except OSError as error:
        if (problem := storage_error(error)) is None:
            raise
        _print_error(problem)
        sys.exit(2)
    except Exception as error:
        if not _is_of_ray(error):
            raise
        logging.getLogger("detox_ray").error("Ray failed", exc_info=error)
        _print_error(f"Ray failed ({type(error).__name__}: {first_line(error)}); the same command continues the run")
        sys.exit(1)


def _loading() -> Status:
    """Shown in a terminal while torch, transformers and Ray are imported, which takes seconds."""
    return Console(stderr=True).status("loading")


def _is_of_ray(error: Exception) -> bool:
    """Whether a node, the cluster or a process of Ray's own was lost."""
    return "ray" in sys.modules and isinstance(error, sys.modules["ray"].exceptions.RayError)


def _print_error(error: DetoxError | str) -> None:
    message = escape(" ".join(str(error).split()))
    Console(stderr=True, highlight=False).print(f"[red]error:[/red] {message}", soft_wrap=True)
