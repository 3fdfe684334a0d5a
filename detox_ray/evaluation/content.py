"""What the report says, gathered once from the files of a folder for the page, the Markdown twin and the model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detox_ray.config_section import LAB_PREFIX
from detox_ray.evaluation import figures, summary, tables
from detox_ray.evaluation.analysis_figures import AnalysisSection, analysis_section
from detox_ray.evaluation.evaluation_file import (
    Evaluation,
    compared,
    compared_systems,
    measured,
    p_value,
    ratio,
    read_evaluation,
    splits,
    systems,
    threshold,
    value,
)
from detox_ray.evaluation.examples import SystemExamples, system_examples
from detox_ray.evaluation.figures import Figure
from detox_ray.evaluation.metric_format import (
    METRICS,
    TIMES,
    format_factor,
    format_percent_change,
    format_percent_change_range,
    format_range,
    format_value,
)
from detox_ray.evaluation.paired_responses import PairedResponses, read_paired_responses
from detox_ray.evaluation.response_tables import disagreement_table, evaluations_table, flow_tables
from detox_ray.evaluation.reward_hacking import RewardJudgeGap, reward_judge_gap
from detox_ray.evaluation.run_files import (
    facts,
    parse_config_text,
    published_name,
    read_analysis,
    read_lines,
    read_text,
    section,
)
from detox_ray.evaluation.tables import Table
from detox_ray.evaluation.training_figures import evaluation_curves, training_curves
from detox_ray.metrics_file import (
    DEV_PROMPTS_FILE,
    EVALUATIONS_FILE,
    GENERATIONS_FILE,
    METRICS_FILE,
    REJECTED_FILE,
    read_metrics,
)


@dataclass(frozen=True)
class Tile:
    """A number beside the headline: `lost` marks one beyond its bound."""

    label: str
    value: str
    detail: str
    bound: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Headline:
    """Mean toxicity of a system against the reference, or, with an empty `before`, of the only system."""

    system: str
    before: str
    after: str
    change: str
    interval: str
    tiles: list[Tile]
    verdict: str
    cautions: list[str]


@dataclass(frozen=True)
class ReportContent:
    """Everything the report shows, formatted; what the folder has no file for is empty."""

    name: str
    title: str
    setting: str
    is_lab: bool
    headlines: list[Headline]
    warnings: list[str]
    rejections: list[str]
    metrics: Table
    split_metrics: list[Table]
    small_print: list[str]
    studies: list[Table]
    pair_summaries: dict[str, str]
    scorers: list[Table]
    flows: list[Table]
    figures: list[Figure]
    training: list[Figure]
    evaluated: list[Figure]
    evaluations: Table | None
    gap: RewardJudgeGap | None
    analysis: AnalysisSection | None
    examples: list[SystemExamples]
    facts: list[tuple[str, str]]
    versions: dict[str, str]
    config: dict[str, Any]
    config_text: str
    evaluation: Evaluation


def gather(folder: Path) -> ReportContent:
    """The content of the report on an evaluation folder.

    Raises:
        DataError: the evaluation or the generations are missing, unreadable or of an older version.
    """
    evaluation = read_evaluation(folder)
    responses = read_paired_responses(folder / GENERATIONS_FILE, systems(evaluation))
    config_text = read_text(folder / "config.yaml")
    config = parse_config_text(config_text)
    evaluations = read_lines(folder / EVALUATIONS_FILE)
    gap = reward_judge_gap(evaluations)
    analysis = read_analysis(folder)
    examples = [system_examples(responses, evaluation, name) for name in compared_systems(evaluation)]
    flow_chart, scatter = figures.bucket_flow_chart(responses), figures.perplexity_scatter(evaluation)
    histogram = figures.toxicity_histogram(responses, threshold(evaluation))
    name = str(config.get("name") or folder.resolve().name)
    return ReportContent(
        name=name,
        title=_title(name, evaluation),
        setting=_setting(evaluation, folder),
        is_lab=str(section(config, "policy").get("model", "")).startswith(LAB_PREFIX),
        headlines=_headlines(evaluation),
        warnings=[gap.warning] if gap and gap.warning else [],
        rejections=[_rejection(line) for line in read_metrics(folder / REJECTED_FILE)],
        metrics=tables.metric_table(evaluation),
        split_metrics=[tables.metric_table(evaluation, split) for split in splits(evaluation) if split != "all"],
        small_print=_small_print(evaluation),
        studies=_study_tables(evaluation),
        pair_summaries={found.system: found.summary for found in examples},
        scorers=_scorer_tables(evaluation, responses),
        flows=flow_tables(responses),
        figures=[figure for figure in (flow_chart, scatter, histogram) if figure],
        training=training_curves(read_lines(folder / METRICS_FILE)),
        evaluated=evaluation_curves(evaluations, gap),
        evaluations=evaluations_table(evaluations),
        gap=gap,
        analysis=None if analysis is None else analysis_section(analysis),
        examples=examples,
        facts=facts(config, evaluation),
        versions=evaluation.get("versions") or {},
        config=config,
        config_text=config_text,
        evaluation=evaluation,
    )


def _rejection(line: dict[str, Any]) -> str:
    """What became of a step that diverged."""
    rejected = f"Step {line['step'] + 1} was rejected: {line['reason']}. The run went back to the last good adapter"
    if line["stopped"]:
        return f"{rejected} and stopped there, as it had gone back before."
    return f"{rejected} and on with learning rates {TIMES}{line['rate_scale']:g}."


def _title(name: str, evaluation: Evaluation) -> str:
    count = len(systems(evaluation))
    if count == 1:
        return f"{name}: toxicity"
    return f"{name}: before and after detoxification" if count == 2 else f"{name}: {count} systems compared"


def _setting(evaluation: Evaluation, folder: Path) -> str:
    # A fine-tuning keeps the adapter of the lowest loss on its dev examples, so their prompts are not unseen.
    of_run = "dev " if (folder / DEV_PROMPTS_FILE).exists() else "held-out "
    return (
        f"Judged by {evaluation.get('judge', 'an unnamed judge')} on {evaluation.get('prompts', '?')} "
        f"{of_run if 'steps' in evaluation else ''}prompts, "
        f"{evaluation.get('samples_per_prompt', '?')} responses each."
    )


def _headlines(evaluation: Evaluation) -> list[Headline]:
    reference = evaluation["reference"]
    before = format_value("mean_toxicity", value(evaluation, reference, "mean_toxicity"))
    compared_names = compared_systems(evaluation)
    if not compared_names:
        interval = format_range("mean_toxicity", measured(evaluation, reference, "mean_toxicity"))
        tiles = _measured_tiles(evaluation, reference)
        return [Headline(reference, "", before, "", interval, tiles, summary.measurement(evaluation), [])]
    found = []
    for name in compared_names:
        reduction = compared(evaluation, name, "reduction").get("mean_toxicity") or {}
        found.append(
            Headline(
                name,
                before,
                format_value("mean_toxicity", value(evaluation, name, "mean_toxicity")),
                format_percent_change(reduction.get("value")),
                format_percent_change_range(reduction),
                _fluency_tiles(evaluation, name),
                summary.verdict(evaluation, name),
                summary.cautions(evaluation, name),
            )
        )
    return found


def _measured_tiles(evaluation: Evaluation, system: str) -> list[Tile]:
    names = ("share_toxic", "expected_maximum_toxicity", "toxicity_probability")
    return [
        Tile(METRICS[name][0], format_value(name, interval["value"]), f"95% interval {format_range(name, interval)}")
        for name in names
        if (interval := measured(evaluation, system, name))
    ]


def _fluency_tiles(evaluation: Evaluation, system: str) -> list[Tile]:
    """The fluency metrics that have a bound and were measured."""
    tiles = []
    for name, bound in summary.FLUENCY_BOUNDS.items():
        before, after = (value(evaluation, s, name) for s in (evaluation["reference"], system))
        if before is None and after is None:
            continue
        factor = ratio(evaluation, system, name)
        detail = f"{format_value(name, before)} → {format_value(name, after)}"
        tiles.append(Tile(METRICS[name][0], format_factor(factor), detail, str(bound), bound.is_broken(factor)))
    return tiles


def _small_print(evaluation: Evaluation) -> list[str]:
    several = len(systems(evaluation)) > 1
    p_values = {name: p for name in compared_systems(evaluation) if (p := p_value(evaluation, name)) is not None}
    found = [
        "95% intervals by percentile bootstrap over prompts"
        + (", of distinct-1, -2 and -3 by jackknife" if evaluation.get("distinct_2_at") else "")
        + ("; changes resample the same prompts for both systems." if several else "."),
        tables.p_value_note(p_values),
        f"Toxic means {threshold(evaluation):g} or more. Expected maximum and probability as in Gehman et al. 2020, "
        f"over {evaluation.get('samples_per_prompt', '?')} responses per prompt: they grow with that number.",
        f"Perplexity under {published_name(evaluation['perplexity_model'])}."
        if evaluation.get("perplexity_model")
        else "",
        f"Relevance by {published_name(evaluation['relevance_model'])}." if evaluation.get("relevance_model") else "",
        f"Distinct-n at {evaluation['distinct_2_at']}." if evaluation.get("distinct_2_at") else "",
    ]
    return [sentence for sentence in found if sentence]


def _study_tables(evaluation: Evaluation) -> list[Table]:
    if not compared_systems(evaluation):
        return []
    return [table for split in ("all", "toxic") if (table := tables.reduction_table(evaluation, split))]


def _scorer_tables(evaluation: Evaluation, responses: PairedResponses) -> list[Table]:
    found = (
        tables.scorer_table(evaluation),
        tables.agreement_table(evaluation),
        disagreement_table(evaluation, responses),
    )
    return [table for table in found if table]
