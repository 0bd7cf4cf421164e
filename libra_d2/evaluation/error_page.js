"use strict";
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { models, names, comparison } = data;
const letters = ["A", "B"].slice(0, models.length);

/** A new element; text is set as text, so that names cannot be markup. */
function element(tag, { text, parent, svg, ...attributes } = {}) {
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

const number = (digits, signed) => (x) => x === null || x === undefined ? "–"
  : typeof x === "string" ? x
  : (signed && x > 0 ? "+" : "") + x.toFixed(digits).replace("-", "−");
const [percent, change, share, whole] =
  [number(1), number(1, true), number(2), number(0)];

// Tables -------------------------------------------------------------------------------------

/**
 * A table that a click on a header sorts, numbers in descending order first.
 * Columns are [header, value of a row, its format, class of the cells].
 */
function showTable(parent, caption, columns, rows, { decorate } = {}) {
  const frame = element("div", { class: "table", tabindex: 0, role: "region" });
  frame.setAttribute("aria-label", caption);
  const table = element("table", { parent: frame });
  const head = element("tr", { parent: element("thead", { parent: table }) });
  const body = element("tbody", { parent: table });
  const lines = rows.map((row) => {
    const line = element("tr");
    for (const [, value, format = String, kind = ""] of columns) {
      const text = format(value(row), row);
      element("td", { text, parent: line, class: kind, ...(text.length > 20 && { title: text }) });
    }
    decorate?.(line, row);
    return line;
  });
  body.append(...lines);
  for (const [header, value, , kind = ""] of columns) {
    const cell = element("th", { parent: head, scope: "col", class: kind, "aria-sort": "none" });
    element("button", { type: "button", text: header, parent: cell }).onclick = () => {
      const isText = rows.some((row) => typeof value(row) === "string");
      const before = cell.getAttribute("aria-sort");
      const order = (before === "none" ? isText : before === "descending")
        ? "ascending" : "descending";
      for (const other of head.children) other.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const keys = rows.map((row, i) => [value(row) ?? null, lines[i]]);
      keys.sort(([x], [y]) => (x === null) - (y === null)  // what has no value is last
        || sign * (isText ? String(x).localeCompare(String(y), undefined, { numeric: true })
          : x - y));
      body.append(...keys.map(([, line]) => line));
    };
  }
  byId(parent).replaceChildren(frame);
  return lines;
}

/** A column of the same value for each model. */
const ofModels = (title, value, format) => letters.map((letter, i) =>
  [models.length > 1 ? `${letter}: ${title}` : title, (row) => value(row, i), format]);

function showTables() {
  letters.forEach((letter, i) => {
    const line = element("div", { parent: byId("names") });
    element("b", { text: letter, parent: line });
    line.append(" ", names[i]);
  });
  if (comparison) {
    const mark = { helps: "▲ helps", harms: "▼ harms" };
    const interval = (low, x) => low === null ? "–" : `${change(low)} to ${change(x.high)}`;
    showTable("metrics-table", "Metrics", [
      ["metric", (x) => x.metric],
      ["A", (x) => x.a, percent], ["B", (x) => x.b, percent],
      ["B less A", (x) => x.difference, change],
      ["95% interval", (x) => x.low, interval],
      ["verdict", (x) => mark[x.says] ?? "", String, "phrase"],
    ], comparison, { decorate: (line, x) => line.classList.toggle("verdict", x.says in mark) });
    const said = (word) => comparison.filter((x) => x.says === word).map((x) => x.metric);
    const ap = comparison[0];
    const sentences = ["helps", "harms"].filter((word) => said(word).length)
      .map((word) => `B ${word}: ${said(word).join(", ")}. `);
    byId("summary").textContent =
      `AP: ${percent(ap.a)} % of A, ${percent(ap.b)} % of B (${change(ap.difference)}; 95% `
      + `interval ${change(ap.low)} to ${change(ap.high)}). `
      + (sentences.join("") || "No difference in the table is clear. ")
      + `A alone finds ${data.only[0]} objects, B alone ${data.only[1]}. Intervals and verdicts `
      + "are about these two models on other images: trained again, both would differ, too. "
      + "Verdicts are corrected for the number of rows; rows without one cannot be told from "
      + "chance. Of errors, fewer are better.";
  } else {
    showTable("metrics-table", "Metrics", [["metric", (x) => x[0]], ["%", (x) => x[1], percent]],
      Object.entries(models[0].metrics));
    byId("differences-chart").remove();
  }
  showTable("errors-table", "Number of errors",
    [["errors", (x) => x], ...ofModels("number", (x, i) => models[i].errors[x], whole)],
    Object.keys(models[0].errors));
  showTable("ranges-table", "Objects by size and crowdedness", [
    ["objects", (x) => x], ["number", (x) => models[0].ranges[x].objects, whole],
    ...ofModels("missed", (x, i) => models[i].ranges[x].missed, whole),
    ...ofModels("AR", (x, i) => models[i].ranges[x].AR, percent),
  ], Object.keys(models[0].ranges));
  const classAP = (x, i) => models[i].classes[x].AP;
  showTable("classes-table", "Classes", [
    ["class", (x) => x], ["objects", (x) => models[0].classes[x].objects, whole],
    ...ofModels("AP", classAP, percent),
    ...(comparison ? [["B less A", (x) => classAP(x, 1) - classAP(x, 0), change]] : []),
    ...ofModels("AP50", (x, i) => models[i].classes[x].AP50, percent),
  ], Object.keys(models[0].classes));
}

// Charts: A and B differ by the dashes, marks and patterns, too ---------------------------------

/** Plotly reads some markup in its texts. */
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const short = (text) => plain(text.length > 18 ? `${text.slice(0, 17)}…` : text);

function drawCharts() {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colors = [color("--a"), color("--b")];
  const axis = { gridcolor: color("--line"), zerolinecolor: color("--quiet"), automargin: true,
    fixedrange: true };
  const label = (i) => models.length > 1 ? letters[i] : plain(names[i]);

  function draw(id, traces, { height = 300, xaxis, yaxis, ...layout }) {
    byId(id).style.cssText = `height: ${height}px; min-height: 0`;
    Plotly.react(id, traces, {
      font: { color: color("--text"), size: 12 }, margin: { l: 45, r: 10, t: 10, b: 40 },
      paper_bgcolor: "transparent", plot_bgcolor: "transparent", showlegend: models.length > 1,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, dragmode: false,
      hoverlabel: { align: "left" },
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...layout,
    }, { displayModeBar: false, responsive: true });
  }

  /** A point or a bar with each model's value for each name, from top to bottom. */
  function drawNames(id, labels, value, hover, { isBar = false, xaxis } = {}) {
    const places = labels.map((_, i) => i);
    const traces = models.map((_, i) => ({
      name: label(i), x: labels.map((x) => value(x, i)), y: places, orientation: "h",
      text: labels.map((x) => `${label(i)}, ${plain(x)}: ${percent(value(x, i))} %${hover(x, i)}`),
      hovertemplate: "%{text}<extra></extra>", textposition: "none",
      ...(isBar ? { type: "bar" } : { type: "scatter", mode: "markers" }),
      marker: { color: colors[i], line: { color: colors[i], width: 1.5 },
        ...(isBar ? { pattern: { shape: ["", "/"][i], fillmode: "overlay", fgcolor: color("--ground"),
          fgopacity: 1 } }
          : { symbol: ["circle", "diamond-open"][i], size: 10 }) },
    }));
    draw(id, traces, { height: 90 + labels.length * (isBar ? 34 : 26), barmode: "group",
      xaxis: { title: { text: "%" }, rangemode: "tozero", ...xaxis },
      yaxis: { tickvals: places, ticktext: labels.map(short), range: [labels.length - 0.4, -0.6],
        zeroline: false } });
  }

  draw("iou-chart", models.map(({ metrics }, i) => ({
    name: label(i), x: data.thresholds,
    y: data.thresholds.map((x) => metrics[`AP${Math.round(100 * x)}`]),
    mode: "lines+markers", line: { color: colors[i], dash: ["solid", "dash"][i] },
    marker: { symbol: ["circle", "diamond-open"][i], size: 8 },
    hovertemplate: "%{y:.1f} %",
  })), { hovermode: "x unified", xaxis: { title: { text: "IoU" }, dtick: 0.1 },
    yaxis: { title: { text: "AP (%)" }, rangemode: "tozero" } });

  const errorMetrics = { missed: "missed objects" };
  drawNames("errors-chart", Object.keys(models[0].errors),
    (x, i) => models[i].metrics[errorMetrics[x] ?? `${x} errors`],
    (x, i) => `, ${models[i].errors[x]} errors`, { isBar: true, 
    xaxis: { title: { text: "AP50 gained (%)" } } });
  drawNames("ranges-chart", Object.keys(models[0].ranges).filter((x) => models[0].ranges[x].objects),
    (x, i) => models[i].ranges[x].AP, (x) => `, ${models[0].ranges[x].objects} objects`,
    { xaxis: { title: { text: "AP (%)" } } });

  const gap = (x) => comparison ? Math.abs(models[1].classes[x].AP - models[0].classes[x].AP)
    : -models[0].classes[x].AP;
  const classes = Object.keys(models[0].classes).sort((x, y) => gap(y) - gap(x));
  const most = comparison ? "the largest differences" : "the lowest AP";
  byId("classes-caption").textContent = "AP by class"
    + (classes.length > 30 ? `: the 30 of ${classes.length} with ${most}` : `, ${most} first`);
  drawNames("classes-chart", classes.slice(0, 30), (x, i) => models[i].classes[x].AP,
    (x) => `, ${models[0].classes[x].objects} objects`, { xaxis: { title: { text: "AP (%)" } } });

  const calibrated = models.map((x, i) => [x.calibration, i]).filter(([x]) => x.bins);
  draw("calibration-chart", [
    { x: [0, 100], y: [0, 100], mode: "lines", hoverinfo: "skip", showlegend: false,
      line: { color: color("--quiet"), width: 1, dash: "dot" } },
    ...calibrated.map(([{ bins, "expected calibration error": error }, i]) => ({
      name: `${label(i)} (on average ${percent(error)} % apart)`, x: bins.map((x) => x.score),
      y: bins.map((x) => x.precision), customdata: bins.map((x) => x.detections),
      mode: "lines+markers", line: { color: colors[i], dash: ["solid", "dash"][i] },
      marker: { symbol: ["circle", "diamond-open"][i], size: 8 },
      hovertemplate: "score %{x:.1f} %, right %{y:.1f} %, %{customdata} detections",
    }))], { showlegend: true, xaxis: { title: { text: "mean score (%)" } },
    yaxis: { title: { text: "precision (%)" } } });

  if (!comparison) return;
  const rows = comparison.filter((x) => x.difference !== null);
  draw("differences-chart", [{
    x: rows.map((x) => x.difference), y: rows.map((_, i) => i), mode: "markers",
    error_x: { type: "data", symmetric: false, color: color("--quiet"),
      array: rows.map((x) => x.high - x.difference), arrayminus: rows.map((x) => x.difference - x.low) },
    marker: { color: color("--text"), size: 9, symbol: rows.map((x) =>
      ({ helps: "triangle-up", harms: "triangle-down" })[x.says] ?? "circle-open") },
    text: rows.map((x) => `${x.metric}: ${change(x.difference)} (${change(x.low)} to `
      + `${change(x.high)}), ${x.says}`),
    hovertemplate: "%{text}<extra></extra>",
  }], { height: 80 + 17 * rows.length, showlegend: false,
    xaxis: { title: { text: "B less A (%), 95% interval; ▲ helps, ▼ harms" } },
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

// Images ------------------------------------------------------------------------------------

let chosen = [...data.images.keys()], position = 0, imageLines = [];
const layers = [["truth", "ground truth", "g"], ...letters.map((x, i) =>
  [`model-${i}`, models.length > 1 ? `${x}: ${names[i]}` : names[i], x.toLowerCase()]),
["same", "objects that all find", "s"], ["labels", "labels", "l"]];

/** A rectangle or line with a dark border, which shows on any ground. */
function outline(tag, attributes, parent) {
  element(tag, { svg: true, parent, ...attributes });
  element(tag, { svg: true, parent, class: "own", ...attributes });
}

function showSwitches() {
  for (const [layer, text, key] of layers) {
    const box = element("label", { parent: byId("switches"), title: text });
    const input = element("input", { type: "checkbox", id: `show-${layer}`, parent: box });
    input.checked = true;
    input.onchange = () => byId("overlay").classList.toggle(`no-${layer}`, !input.checked);
    if (layer === "truth" || layer.startsWith("model")) {
      const sample = element("svg", { svg: true, parent: box, width: 40, height: 12,
        class: `box ${layer}` });
      outline("line", { x1: 2, x2: 38, y1: 6, y2: 6 }, sample);
    }
    const at = text.toLowerCase().indexOf(key);
    const [before, letter, after] = at < 0 ? ["", key.toUpperCase(), ` ${text}`]
      : [text.slice(0, at), text[at], text.slice(at + 1)];
    box.append(" ", before);
    element("u", { text: letter, parent: box });
    box.append(after);
  }
}

function showImage() {
  const image = data.images[chosen[position]];
  byId("previous").disabled = position <= 0;
  byId("next").disabled = position >= chosen.length - 1;
  byId("images-count").textContent =
    `${data.images.length} of ${data.num_images} images are on this page, `
    + (comparison ? "those where the AP of A and B differs most" : "those with the lowest AP")
    + (data.images.length < data.num_images ? "" : " first")
    + (chosen.length < data.images.length ? `; ${chosen.length} have this class. ` : ". ")
    + (image ? `Image ${position + 1} of ${chosen.length}:` : "");
  byId("browser").classList.toggle("empty", !image);
  imageLines.forEach((line, i) => line.classList.toggle("chosen", i === chosen[position]));
  byId("overlay").replaceChildren();
  byId("photo").removeAttribute("src");
  if (!image) return;
  const { jpeg, objects, detections } = JSON.parse(byId(`picture-${chosen[position]}`).textContent);
  byId("image-name").textContent = `${image.file_name}: AP `
    + (comparison ? `${percent(image.a)} % of A, ${percent(image.b)} % of B; A alone finds `
      + `${image.only_a} objects, B alone ${image.only_b}`
      : `${percent(image.a)} %, ${image.errors} errors`);
  const [width, height] = image.size;
  byId("picture").style.cssText =
    `aspect-ratio: ${width} / ${height}; max-width: calc(72vh * ${width / height})`;
  byId("photo").alt = image.file_name;
  if (jpeg) byId("photo").src = `data:image/jpeg;base64,${jpeg}`;

  const findsAll = objects.map((x) => !x[5] || x[5].every(Boolean));
  const className = (k) => data.class_names[k];
  const onlyClass = byId("class-filter").value, minScore = Number(byId("min-score").value);
  function box([x, y, w, h, k], layer, same, label, more, about) {
    if (onlyClass !== "" && k !== Number(onlyClass)) return;
    const group = element("g", { svg: true, parent: byId("overlay"),
      class: `box ${layer}${same ? " same" : ""}` });
    const place = (v, size) => `${(100 * v / size).toFixed(3)}%`;
    outline("rect", { x: place(x, width), y: place(y, height), width: place(w, width),
      height: place(h, height) }, group);
    const isLeft = x < 0.7 * width;
    if (!same) {
      // Above the box for objects, within and below it for A and B, and always in the picture.
      const [y0, dy] = { truth: [Math.max(y, 0.04 * height), -4], "model-0": [y + h, -4],
        "model-1": [Math.min(y + h, 0.96 * height), 12] }[layer];
      const text = element("text", { svg: true, parent: group, text: label, dy, dx: isLeft ? 3 : -3,
        x: place(isLeft ? x : x + w, width), y: place(y0, height),
        "text-anchor": isLeft ? "start" : "end" });
      element("tspan", { svg: true, parent: text, text: more });
    }
    element("title", { svg: true, parent: group, text: about });
  }
  const finding = (pair) => pair ? `IoU ${share(pair[0])}, score ${share(pair[1])}` : "not found";
  objects.forEach((x, i) => box(x, "truth", findsAll[i], className(x[4]), "",
    `${className(x[4])}, ground truth. ` + (x[5] ? x[5].map((pair, j) =>
      `${letters[j]}: ${finding(pair)}`).join("; ") : "Crowd region: need not be found")));
  detections.forEach((rows, i) => rows.filter((x) => x[5] >= minScore).forEach((x) => box(
    x, `model-${i}`, findsAll[x[7]] ?? x[6] === "not counted",
    letters[i], x[6] === "right" ? "" : ` ${x[6]}`,
    `${letters[i]}: ${className(x[4])}, score ${share(x[5])}, ${x[6]}`)));
  showTable("objects-table", "Objects in this image", [
    ["object", (x) => className(x[4])],
    ...ofModels("IoU", (x, i) => x[5][i]?.[0], share),
    ...ofModels("score", (x, i) => x[5][i]?.[1], share),
  ], objects.filter((x) => x[5] && (onlyClass === "" || x[4] === Number(onlyClass))));
}

function go(step) {
  position = Math.min(Math.max(position + step, 0), Math.max(chosen.length - 1, 0));
  showImage();
}

function filterImages() {
  const value = byId("class-filter").value;
  chosen = [...data.images.keys()].filter((i) =>
    value === "" || data.images[i].classes.includes(Number(value)));
  position = 0;
  showImage();
}

function startImages() {
  showSwitches();
  const inUse = new Set(data.images.flatMap((x) => x.classes));
  data.class_names.forEach((text, value) => {
    if (inUse.has(value)) element("option", { text, value, parent: byId("class-filter") });
  });
  imageLines = showTable("images-table", "Images", [
    ["image", (x) => x.file_name],
    ...(comparison ? [["A: AP", (x) => x.a, percent], ["B: AP", (x) => x.b, percent],
      ["B less A", (x) => x.difference, change], ["only A finds", (x) => x.only_a, whole],
      ["only B finds", (x) => x.only_b, whole]]
      : [["AP", (x) => x.a, percent], ["errors", (x) => x.errors, whole]]),
  ], data.images, { decorate: (line, image) => {
    const cell = line.firstChild;
    cell.replaceChildren();
    element("button", { type: "button", text: image.file_name, parent: cell }).onclick = () => {
      const at = () => chosen.indexOf(data.images.indexOf(image));
      if (at() < 0) {
        byId("class-filter").value = "";
        filterImages();
      }
      position = at();
      showImage();
      byId("browser").scrollIntoView();
    };
  } });
  byId("previous").onclick = () => go(-1);
  byId("next").onclick = () => go(1);
  byId("class-filter").onchange = filterImages;
  byId("min-score").onchange = showImage;
  document.addEventListener("keydown", (event) => {
    const isBusy = event.ctrlKey || event.metaKey || event.altKey
      || event.target.closest("select, input:not([type=checkbox]), .table");
    if (isBusy || !data.images.length) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const layer = layers.find((x) => x[2] === event.key.toLowerCase());
    if (step) go(step);
    if (layer) byId(`show-${layer[0]}`).click();
  });
  showImage();
}

showTables();
addEventListener("DOMContentLoaded", () => {
  startImages();
  requestAnimationFrame(() => setTimeout(startCharts));
});
