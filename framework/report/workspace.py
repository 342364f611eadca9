"""The same summary as a W&B report: the runs that W&B has, one run set a configuration. Needs the extra `report` and an API key."""

from __future__ import annotations

from typing import Any

from components.contracts import UserError
from framework.report import markdown, text
from framework.report.group import Configuration
from framework.report.summary import Summary

TITLE_LENGTH = 120  # W&B allows 128


def publish(summary: Summary, entity: str, project: str) -> str:
    """Save the report and return its address.

    Raises:
        UserError: the extra is not installed, no API key, no run that W&B has, or the server refuses or cannot be reached.
    """
    from framework.wandb_logger import has_key, host

    try:
        import wandb
        import wandb_workspaces.reports.v2 as reports
    except ImportError as error:
        raise UserError(f"--wandb: {error.name} is not installed; pip install -e '.[report]'") from error
    if not has_key():
        raise UserError(f"--wandb: no API key for {host()}; run `wandb login` or set WANDB_API_KEY")
    contents = blocks(summary, entity, project)
    try:
        report = reports.Report(
            entity=entity, project=project, title=f"{summary.title}"[:TITLE_LENGTH], description=text.headline(summary), blocks=contents,
            width="fluid",
        )  # fmt: skip
        report.save()
        return str(report.url)
    except (wandb.errors.Error, OSError, ValueError) as error:
        raise UserError(
            f"--wandb: {host()} did not take the report for {entity}/{project}: {' '.join(str(error).split())[:200]}"
        ) from error


def run_ids(configuration: Configuration) -> list[str]:
    """W&B ids of the configuration's counted runs."""
    return [str(run.state["wandb_id"]) for run in configuration.runs if run.state.get("wandb_id")]


def blocks(summary: Summary, entity: str, project: str) -> list[Any]:
    """Blocks of the report: what the local one has, with W&B's own live panels for the curves.

    Raises:
        UserError: W&B has none of the runs.
    """
    import wandb_workspaces.reports.v2 as r
    from wandb_workspaces import expr

    known = [c for c in summary.configurations if run_ids(c)]
    if not known:
        raise UserError("--wandb: none of the finished runs was logged to W&B (logger=wandb; then `wandb sync` where it was offline)")
    runsets = [
        r.Runset(entity=entity, project=project, name=c.label, filters=[expr.Metric("ID").isin(run_ids(c))], groupby=["JobType"])
        for c in known
    ]
    curves: list[Any] = [
        r.LinePlot(title=f"{metric} over {axis}", x=axis, y=[metric], groupby_aggfunc="mean", groupby_rangefunc="minmax")
        for metric in dict.fromkeys([summary.metric, "train/loss"])
        for axis in ("tokens", "seconds")
    ]
    bars = r.BarPlot(title=summary.metric, metrics=[summary.metric], groupby_aggfunc="mean", groupby_rangefunc="stddev")
    contents: list[Any] = [r.P(text.headline(summary)), r.P(f"{text.counts(summary)}.")]
    if summary.verdict:
        contents += [r.H2("Claim"), r.MarkdownBlock("\n\n".join(markdown.claim(summary)))]
    contents += [r.H2("Results"), r.MarkdownBlock(markdown.results(summary))]
    if summary.pairs:
        contents += [r.H2("Paired differences"), r.MarkdownBlock(f"{markdown.PAIRED_NOTE}\n\n{markdown.pairs(summary)}")]
    contents += [r.H2("Curves"), r.PanelGrid(runsets=runsets, panels=[*curves, bars, r.RunComparer(diff_only="split")])]
    contents += [r.H2("Cost"), r.MarkdownBlock(markdown.costs(summary))]
    if summary.differing:
        contents += [r.H2("Configurations"), r.MarkdownBlock(markdown.differing(summary))]
    if summary.unfinished:
        contents += [r.H2("Not finished"), r.MarkdownBlock(markdown.unfinished(summary))]
    return [*contents, r.H2("Commands"), r.CodeBlock("\n".join(c.command for c in summary.configurations))]
