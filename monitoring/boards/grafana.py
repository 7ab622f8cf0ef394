"""Grafana's JSON of a dashboard."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from monitoring.boards.board import NOW, Board, Chart, Limits
from monitoring.links import board_uid, runbook

_SOURCE = model.DataSourceRef(type_val="prometheus", uid="$datasource")
_TAG = "deepsplit"
_HEIGHT = 8


def to_json(board: Board, runbooks: str) -> str:
    """The file that Grafana imports; `runbooks` is the base of the pages' URLs."""
    made = (
        build.Dashboard(board.title)
        .uid(board_uid(board.name))
        .description(board.about)
        .tags([_TAG])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(_boards_link())
        .link(build.DashboardLink("Runbooks").type(model.DashboardLinkType.LINK).url(runbooks).target_blank(True))
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("model", "Model", "deepsplit_process_info, model"))
        .with_variable(_variable("node", "Node", 'deepsplit_process_info{model=~"$model"}, node'))
    )
    if board.by_tenant:
        made.with_variable(_variable("tenant", "Tenant", 'deepsplit_requests_total{model=~"$model"}, tenant'))
    ids = itertools.count(1)
    for row in board.rows:
        made.with_row(build.Row(row.title).id(next(ids)))
        for chart in row.charts:
            made.with_panel(_panel(chart, runbooks).id(next(ids)))
    return json.dumps(made.build(), cls=JSONEncoder, sort_keys=True, indent=1) + "\n"


def _boards_link() -> build.DashboardLink:
    link = build.DashboardLink("deepsplit").type(model.DashboardLinkType.DASHBOARDS).tags([_TAG])
    return link.include_vars(True).keep_time(True)


def _variable(name: str, label: str, values: str) -> build.QueryVariable:
    everything = model.VariableOption(selected=True, text="All", value="$__all")
    return (
        build.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(f"label_values({values})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


def _panel(chart: Chart, runbooks: str) -> Any:
    panel = _KINDS[chart.kind](chart)
    panel.title(chart.title).description(chart.bad).unit(chart.unit).datasource(_SOURCE)
    panel.height(_HEIGHT).span(chart.width)
    for query in chart.queries:
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
        target.format(PromQueryFormat.TABLE if chart.kind == "matrix" else PromQueryFormat.TIME_SERIES)
        panel.with_target(target.instant() if chart.kind in NOW else target.range())
    if chart.limits is not None:
        panel.thresholds(_thresholds(chart.limits))
    if chart.alert:
        link = build.DashboardLink(f"Runbook: {chart.alert}").type(model.DashboardLinkType.LINK)
        panel.links([link.url(runbook(runbooks, chart.alert)).target_blank(True)])
    return panel


def _thresholds(limits: Limits) -> build.ThresholdsConfig:
    first, last = ("red", "green") if limits.low_is_bad else ("green", "red")
    low, high = sorted((limits.warning, limits.critical))
    steps = [model.Threshold(None, first), model.Threshold(low, "orange"), model.Threshold(high, last)]
    return build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def _lines(chart: Chart) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True).placement(common_model.LegendPlacement.BOTTOM)
    tooltip = common.VizTooltipOptions().mode(common_model.TooltipDisplayMode.MULTI)
    panel = timeseries.Panel().tooltip(tooltip.sort(common_model.SortOrder.DESCENDING))
    panel.legend(legend.display_mode(common_model.LegendDisplayMode.LIST)).fill_opacity(10)
    if chart.limits is not None:
        dashed = common.GraphThresholdsStyleConfig().mode(common_model.GraphThresholdsStyleMode.DASHED)
        panel.thresholds_style(dashed)
    if chart.kind != "lines":
        mode = common_model.StackingMode.NORMAL if chart.kind == "stack" else common_model.StackingMode.PERCENT
        panel.stacking(common.StackingConfig().mode(mode)).fill_opacity(60)
    return panel


def _latest() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _stat(_chart: Chart) -> stat.Panel:
    panel = stat.Panel().reduce_options(_latest()).graph_mode(common_model.BigValueGraphMode.NONE)
    return panel.text_mode(common_model.BigValueTextMode.VALUE_AND_NAME)


def _bars(_chart: Chart) -> bargauge.Panel:
    panel = bargauge.Panel().reduce_options(_latest()).display_mode(common_model.BarGaugeDisplayMode.BASIC)
    return panel.orientation(common_model.VizOrientation.HORIZONTAL).min(0)


def _heatmap(_chart: Chart) -> heatmap.Panel:
    """One row per series, by its name."""
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return heatmap.Panel().calculate(False).color(color).show_legend()


def _matrix(_chart: Chart) -> table.Panel:
    """Layers down, experts across, coloured by load."""
    options = {"columnField": "expert", "rowField": "layer", "valueField": "Value"}
    cells = model.DynamicConfigValue(id_val="custom.cellOptions", value={"type": "color-background"})
    narrow = model.DynamicConfigValue(id_val="custom.minWidth", value=50)
    color = build.FieldColor().mode(model.FieldColorModeId.CONTINUOUS_GR_YL_RD)
    panel = table.Panel()
    for field in ("expert", "layer"):
        panel.with_transformation(model.DataTransformerConfig(id_val="sortBy", options={"sort": [{"field": field}]}))
    panel.with_transformation(model.DataTransformerConfig(id_val="groupingToMatrix", options=options))
    return panel.color_scheme(color).decimals(1).override_by_regexp(r"^\d+$", [cells, narrow])


_KINDS: dict[str, Callable[[Chart], Any]] = {
    "lines": _lines, "stack": _lines, "fractions": _lines, "stat": _stat, "bars": _bars, "heatmap": _heatmap,
    "matrix": _matrix,
}  # fmt: skip
