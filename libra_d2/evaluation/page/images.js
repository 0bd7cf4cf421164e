// The browser of images.

let chosen = [...data.images.keys()], position = 0, imageLines = [];
/** What can be switched off: its class in the picture, its name, its key. */
const layers = () => [["truth", "ground truth", "g"], ...pair().map((k, i) => [`model-${i}`,
  isAlone ? names[k] : `${letters[k]}: ${names[k]}`, letters[k].toLowerCase()]),
["same", isAlone ? "objects that it finds" : "objects that both find", "s"],
["labels", "labels", "l"]];

/** A rectangle or line with a dark border, which shows on any ground. */
function outline(tag, attributes, parent) {
  element(tag, { svg: true, parent, ...attributes });
  element(tag, { svg: true, parent, class: "own", ...attributes });
}

function showSwitches() {
  byId("switches").replaceChildren();
  byId("overlay").removeAttribute("class");
  for (const [layer, text, key] of layers()) {
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
    + (isAlone ? "those with the lowest AP" : "those where AP differs most from that of A")
    + (data.images.length < data.num_images ? "" : " first")
    + (chosen.length < data.images.length ? `; ${chosen.length} have this class. ` : ". ")
    + (image ? `Image ${position + 1} of ${chosen.length}:` : "");
  byId("browser").classList.toggle("empty", !image);
  imageLines.forEach((line, i) => line.classList.toggle("chosen", i === chosen[position]));
  byId("overlay").replaceChildren();
  byId("photo").removeAttribute("src");
  if (!image) return;
  const { jpeg, objects, detections } = JSON.parse(byId(`picture-${chosen[position]}`).textContent);
  const runs = pair().map((k) => models[k].runs);
  byId("image-name").textContent = `${image.file_name}: AP `
    + (isAlone ? `${percent(image.ap[0])} %, ${whole(image.errors)} errors`
      : `A ${percent(image.ap[0])} %, ${letters[other]} ${percent(image.ap[other])} %`)
    + (Math.max(...runs) > 1 ? ", on average of the runs; the boxes are those of the first" : "");
  const [width, height] = image.size;
  byId("picture").style.cssText =
    `aspect-ratio: ${width} / ${height}; max-width: calc(72vh * ${width / height})`;
  byId("photo").alt = image.file_name;
  if (jpeg) byId("photo").src = `data:image/jpeg;base64,${jpeg}`;

  const findsAll = objects.map((x) => !x[5] || pair().every((k) => x[5][k]));
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
    `${className(x[4])}, ground truth. ` + (x[5] ? x[5].map((found, j) =>
      `${letters[j]}: ${finding(found)}`).join("; ") : "Crowd region: need not be found")));
  pair().forEach((k, i) => detections[k].filter((x) => x[5] >= minScore).forEach((x) => box(
    x, `model-${i}`, findsAll[x[7]] ?? x[6] === "not counted",
    letters[k], x[6] === "right" ? "" : ` ${x[6]}`,
    `${letters[k]}: ${className(x[4])}, score ${share(x[5])}, ${x[6]}`)));
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

function showImagesTable() {
  const letter = letters[other];
  imageLines = showTable("images-table", "Images", [
    ["image", (x) => x.file_name],
    ...ofModels("AP", (x, i) => x.ap[i], percent),
    ...(isAlone ? [["errors", (x) => x.errors, whole]]
      : [[`${letter} less A`, (x) => x.ap[0] === null ? null : x.ap[other] - x.ap[0], change],
        ["only A finds", (x) => x.only[other - 1][0], object],
        [`only ${letter} finds`, (x) => x.only[other - 1][1], object]]),
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
}

function startImages() {
  const inUse = new Set(data.images.flatMap((x) => x.classes));
  data.class_names.forEach((text, value) => {
    if (inUse.has(value)) element("option", { text, value, parent: byId("class-filter") });
  });
  byId("previous").onclick = () => go(-1);
  byId("next").onclick = () => go(1);
  byId("class-filter").onchange = filterImages;
  byId("min-score").onchange = showImage;
  document.addEventListener("keydown", (event) => {
    const isBusy = event.ctrlKey || event.metaKey || event.altKey
      || event.target.closest("select, input:not([type=checkbox]), .table");
    if (isBusy || !data.images.length) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const layer = layers().find((x) => x[2] === event.key.toLowerCase());
    if (step) go(step);
    if (layer) byId(`show-${layer[0]}`).click();
  });
  byId("pair").onchange = () => {
    other = Number(byId("pair").value);
    showPair();
    drawCharts();
    showBoxes();
  };
  showBoxes();
}

function showBoxes() {
  showSwitches();
  showImagesTable();
  showImage();
}

addEventListener("DOMContentLoaded", () => {
  startImages();
  requestAnimationFrame(() => setTimeout(startCharts));
});
