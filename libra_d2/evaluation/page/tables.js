"use strict";
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { models, names, comparisons } = data;
const letters = [..."ABCDEFHIJKMNOPQRTUVWXYZ"].slice(0, models.length);  // other letters are keys
const isAlone = models.length === 1;
let other = models.length - 1;  // the model that A is compared with
const pair = () => isAlone ? [0] : [0, other];

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
  [isAlone ? title : `${letter}: ${title}`, (row) => value(row, i), format]);
const object = (x) => String(Number(x.toFixed(1)));  // a mean number of objects
const spread = (x) => x === null || x === undefined ? "" : ` ± ${x.toFixed(1)}`;
const classAP = (x, i) => models[i].classes[x].AP;

function showTables() {
  letters.forEach((letter, i) => {
    const line = element("div", { parent: byId("names") });
    element("b", { text: letter, parent: line });
    line.append(" ", names[i], models[i].runs > 1 ? `, ${models[i].runs} runs` : "");
    if (i) element("option", { text: `${letter}: ${names[i]}`, value: i, parent: byId("pair") });
  });
  byId("pair").value = other;
  byId("pair-label").hidden = models.length < 3;
  if (isAlone) {
    const { metrics, deviations } = models[0];
    showTable("metrics-table", "Metrics", [["metric", (x) => x],
      ["%", (x) => metrics[x], (v, x) => percent(v) + spread(deviations[x])]],
    Object.keys(metrics));
    byId("differences-chart").remove();
  }
  if (!data.curves.some(Boolean)) byId("training").remove();
  showTable("errors-table", "Number of errors",
    [["errors", (x) => x], ...ofModels("number", (x, i) => models[i].errors[x], whole)],
    Object.keys(models[0].errors));
  showTable("ranges-table", "Objects by size and crowdedness", [
    ["objects", (x) => x], ["number", (x) => models[0].ranges[x].objects, whole],
    ...ofModels("missed", (x, i) => models[i].ranges[x].missed, whole),
    ...ofModels("AR", (x, i) => models[i].ranges[x].AR, percent),
  ], Object.keys(models[0].ranges));
}

/** What depends on the model that A is compared with. */
function showPair() {
  const letter = letters[other];
  showTable("classes-table", "Classes", [
    ["class", (x) => x], ["objects", (x) => models[0].classes[x].objects, whole],
    ...ofModels("AP", classAP, percent),
    ...(isAlone ? [] : [[`${letter} less A`, (x) => classAP(x, other) - classAP(x, 0), change]]),
    ...ofModels("AP50", (x, i) => models[i].classes[x].AP50, percent),
  ], Object.keys(models[0].classes));
  if (isAlone) return;
  const { metrics, pairs, only } = comparisons[other - 1];
  const mark = { helps: "▲ helps", harms: "▼ harms" };
  const interval = (low, x) => low === null ? "–" : `${change(low)} to ${change(x.high)}`;
  const own = (i) => (v, x) => percent(v) + spread(models[i].deviations[x.metric]);
  showTable("metrics-table", "Metrics", [
    ["metric", (x) => x.metric], ["A", (x) => x.a, own(0)], [letter, (x) => x.b, own(other)],
    [`${letter} less A`, (x) => x.difference, change], ["95% interval", (x) => x.low, interval],
    ["verdict", (x) => mark[x.says] ?? "", String, "phrase"],
  ], metrics, { decorate: (line, x) => line.classList.toggle("verdict", x.says in mark) });
  const said = (word) => metrics.filter((x) => x.says === word).map((x) => x.metric);
  const ap = metrics[0];
  const sentences = ["helps", "harms"].filter((word) => said(word).length)
    .map((word) => `${letter} ${word}: ${said(word).join(", ")}. `);
  byId("summary").textContent =
    `AP: A has ${percent(ap.a)} %, ${letter} has ${percent(ap.b)} % (${change(ap.difference)}; 95% `
    + `interval ${interval(ap.low, ap)}). `
    + (sentences.join("") || "No difference in the table is clear. ")
    + `A alone finds ${object(only[0])} objects, ${letter} alone ${object(only[1])}. `
    + (pairs > 1 ? `Values are means of ${pairs} pairs of runs with the same seed. Intervals and `
      + "verdicts are those of paired t-tests: they are about trainings with other seeds, on the "
      + "same images. "
      : "Intervals and verdicts are about these two models on other images: trained again, both "
      + "would differ, too. ")
    + "Verdicts are corrected for the number of rows"
    + (models.length > 2 ? " and models" : "")
    + "; rows without one cannot be told from chance. Of errors, fewer are better.";
}

showTables();
showPair();
