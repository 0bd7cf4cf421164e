// Charts. Models differ by dashes, marks and patterns, too.

/** Plotly reads some markup in its texts. */
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const short = (text) => plain(text.length > 18 ? `${text.slice(0, 17)}…` : text);

const symbols = ["circle", "diamond-open", "square", "triangle-up-open", "cross", "x-open", "star",
  "hexagon-open"];
const dashes = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "2px 6px", "9px 2px"];
const patterns = ["", "/", "x", "\\", "-", "|", "+", "."];

function drawCharts() {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const style = (i) => ({ color: color(`--model-${i % 8}`), symbol: symbols[i % 8],
    dash: dashes[i % 8], pattern: patterns[i % 8] });
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--quiet"), automargin: true,
    fixedrange: true };
  const label = (i) => isAlone ? plain(names[i]) : letters[i];
  /** Error bars of one standard deviation between runs, if there are several. */
  const bars = (i, deviations) => ({ type: "data", array: deviations, visible: models[i].runs > 1,
    color: style(i).color, thickness: 1, width: 3 });
  const line = (i) => ({ name: label(i), mode: "lines+markers",
    line: { color: style(i).color, dash: style(i).dash },
    marker: { symbol: style(i).symbol, size: 8 } });

  function draw(id, traces, { height = 300, xaxis, yaxis, ...layout }) {
    byId(id).style.cssText = `height: ${height}px; min-height: 0`;
    Plotly.react(id, traces, {
      font: { color: color("--text"), size: 12 }, margin: { l: 45, r: 10, t: 10, b: 40 },
      paper_bgcolor: "transparent", plot_bgcolor: "transparent", showlegend: !isAlone,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, dragmode: false,
      hoverlabel: { align: "left" },
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...layout,
    }, { displayModeBar: false, responsive: true });
  }

  /** A point or a bar with each model's value for each name, from top to bottom. */
  function drawNames(id, labels, value, deviation, hover, { isBar = false, xaxis } = {}) {
    const places = labels.map((_, i) => i);
    const traces = models.map((_, i) => ({
      name: label(i), x: labels.map((x) => value(x, i)), y: places, orientation: "h",
      error_x: bars(i, labels.map((x) => deviation(x, i))),
      text: labels.map((x) => `${label(i)}, ${plain(x)}: ${percent(value(x, i))}`
        + `${spread(deviation(x, i))} %${hover(x, i)}`),
      hovertemplate: "%{text}<extra></extra>", textposition: "none",
      ...(isBar ? { type: "bar" } : { type: "scatter", mode: "markers" }),
      marker: { color: style(i).color, line: { color: style(i).color, width: 1.5 },
        ...(isBar ? { pattern: { shape: style(i).pattern, fillmode: "overlay",
          fgcolor: color("--ground"), fgopacity: 1 } } : { symbol: style(i).symbol, size: 10 }) },
    }));
    const height = isBar ? 10 + 12 * models.length : 26;
    draw(id, traces, { height: 90 + labels.length * height, barmode: "group",
      xaxis: { title: { text: "%" }, rangemode: "tozero", ...xaxis },
      yaxis: { tickvals: places, ticktext: labels.map(short), range: [labels.length - 0.4, -0.6],
        zeroline: false } });
  }

  draw("iou-chart", models.map(({ metrics, deviations }, i) => {
    const values = (from) => data.thresholds.map((x) => from[`AP${Math.round(100 * x)}`]);
    return { ...line(i), x: data.thresholds, y: values(metrics), hovertemplate: "%{y:.1f} %",
      error_y: bars(i, values(deviations)) };
  }), { hovermode: "x unified", xaxis: { title: { text: "IoU" }, dtick: 0.1 },
    yaxis: { title: { text: "AP (%)" }, rangemode: "tozero" } });

  if (byId("training")) {
    const seen = data.curves.map((x, i) => [x, i]).filter(([x]) => x);
    draw("training-chart", seen.flatMap(([{ iterations, mean, low, high }, i]) => [
      { x: [...iterations, ...iterations.toReversed()], y: [...high, ...low.toReversed()],
        fill: "toself", fillcolor: style(i).color, opacity: 0.15, line: { width: 0 },
        mode: "lines", hoverinfo: "skip", showlegend: false },
      { ...line(i), x: iterations, y: mean, text: low.map((x, j) =>
        models[i].runs > 1 ? ` (${percent(x)} to ${percent(high[j])})` : ""),
        hovertemplate: "%{y:.1f} %%{text}" },
    ]), { hovermode: "x unified", xaxis: { title: { text: "iteration" } },
      yaxis: { title: { text: "AP (%)" }, rangemode: "tozero" } });
  }

  const errorMetric = (x) => x === "missed" ? "missed objects" : `${x} errors`;
  drawNames("errors-chart", Object.keys(models[0].errors),
    (x, i) => models[i].metrics[errorMetric(x)], (x, i) => models[i].deviations[errorMetric(x)],
    (x, i) => `, ${whole(models[i].errors[x])} errors`,
    { isBar: true, xaxis: { title: { text: "AP50 gained (%)" } } });
  drawNames("ranges-chart", Object.keys(models[0].ranges).filter((x) => models[0].ranges[x].objects),
    (x, i) => models[i].ranges[x].AP,
    (x, i) => models[i].deviations[x === "all" ? "AP" : `AP ${x}`],
    (x) => `, ${models[0].ranges[x].objects} objects`, { xaxis: { title: { text: "AP (%)" } } });

  const gap = (x) => isAlone ? -classAP(x, 0) : Math.abs(classAP(x, other) - classAP(x, 0));
  const classes = Object.keys(models[0].classes).sort((x, y) => gap(y) - gap(x));
  const most = isAlone ? "the lowest AP" : "the largest differences";
  byId("classes-caption").textContent = "AP by class"
    + (classes.length > 30 ? `: the 30 of ${classes.length} with ${most}` : `, ${most} first`);
  drawNames("classes-chart", classes.slice(0, 30), classAP,
    (x, i) => models[i].class_deviations[x],
    (x) => `, ${models[0].classes[x].objects} objects`, { xaxis: { title: { text: "AP (%)" } } });

  const calibrated = models.map((x, i) => [x.calibration, i]).filter(([x]) => x.bins);
  draw("calibration-chart", [
    { x: [0, 100], y: [0, 100], mode: "lines", hoverinfo: "skip", showlegend: false,
      line: { color: color("--quiet"), width: 1, dash: "dot" } },
    ...calibrated.map(([{ bins, "expected calibration error": error }, i]) => ({
      ...line(i), name: `${label(i)} (on average ${percent(error)} % apart)`,
      x: bins.map((x) => x.score), y: bins.map((x) => x.precision),
      customdata: bins.map((x) => x.detections),
      hovertemplate: "score %{x:.1f} %, right %{y:.1f} %, %{customdata} detections",
    }))], { showlegend: true, xaxis: { title: { text: "mean score (%)" } },
    yaxis: { title: { text: "precision (%)" } } });

  if (isAlone) return;
  const rows = comparisons[other - 1].metrics.filter((x) => x.difference !== null);
  draw("differences-chart", [{
    x: rows.map((x) => x.difference), y: rows.map((_, i) => i), mode: "markers",
    error_x: { type: "data", symmetric: false, color: color("--quiet"),
      array: rows.map((x) => x.high === null ? 0 : x.high - x.difference),
      arrayminus: rows.map((x) => x.low === null ? 0 : x.difference - x.low) },
    marker: { color: color("--text"), size: 9, symbol: rows.map((x) =>
      ({ helps: "triangle-up", harms: "triangle-down" })[x.says] ?? "circle-open") },
    text: rows.map((x) => `${x.metric}: ${change(x.difference)} (${change(x.low)} to `
      + `${change(x.high)}), ${x.says}`),
    hovertemplate: "%{text}<extra></extra>",
  }], { height: 80 + 17 * rows.length, showlegend: false,
    xaxis: { title: { text: `${letters[other]} less A (%), 95% interval; ▲ helps, ▼ harms` } },
    yaxis: { tickvals: rows.map((_, i) => i), ticktext: rows.map((x) => x.metric),
      range: [rows.length - 0.4, -0.6], zeroline: false, tickfont: { size: 11 } } });
}

/** Plotly is long. The browser reads it only now, when it shows the rest of the page already. */
function startCharts() {
  element("script", { text: byId("plotly").textContent, parent: document.head });
  drawCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
  document.documentElement.dataset.charts = "drawn";
}
