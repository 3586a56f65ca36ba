"use strict";
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);

// A new element with these properties; `children` are elements or text.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- The table: a heading sorts its column, best first; pressed again, it reverses the order

function sortTable(heading) {
  const body = heading.closest("table").tBodies[0], best = heading.dataset.first;
  const other = {ascending: "descending", descending: "ascending"}[best];
  const order = heading.getAttribute("aria-sort") === best ? other : best;
  const value = (row) => row.cells[heading.cellIndex].dataset.value;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  const filled = [...body.rows].filter(value), empty = [...body.rows].filter((row) => !value(row));
  filled.sort((a, b) => (order === "ascending" ? 1 : -1) * compare(value(a), value(b)));
  for (const cell of heading.parentElement.cells) cell.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  body.append(...filled, ...empty);
}

for (const button of document.querySelectorAll("thead button"))
  button.addEventListener("click", () => sortTable(button.parentElement));

// ---- Images, labels and guesses. An image is its position among all, sorted by class

const bytesOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const guesses = new Map(data.runs.map((run) => [run.name, bytesOf(run.guesses)]));
const labels = data.counts.flatMap((count, label) => Array(count).fill(label));
const firstOf = data.counts.map((_, label) => labels.indexOf(label));
const images = [...labels.keys()], copies = Object.keys(data.copies).map(Number);
const superclass = (label) => data.superclasses[data.superclassOf[label]];

// A run's i-th guess for an image, most probable first: [class, percent].
function guessOf(run, image, i = 0) {
  const start = 2 * data.guesses * image + i, bytes = guesses.get(run);
  return [bytes[start], bytes[start + data.guesses]];
}

const isRight = (run, image) => guessOf(run, image)[0] === labels[image];

function picture(sheet, place) {
  const element = make("span", {className: `picture sheet-${sheet}`});
  element.style.setProperty("--column", place % data.columns);
  element.style.setProperty("--row", Math.floor(place / data.columns));
  return element;
}

const pictureOf = (image) => picture(labels[image], image - firstOf[labels[image]]);

// ---- What is chosen: the form of filters and the image, both kept in the address

const PAGE = 120; // images that scrolling adds
const form = byId("filters"), controls = [...form.elements].filter((control) => control.name);
let found = [], chosen = null;

const value = (name) => form.elements[name]?.value ?? "";

function address() {
  const state = new URLSearchParams([...new FormData(form)].filter(([name, text]) => text !== initial[name]));
  if (chosen !== null && chosen !== found[0]) state.set("image", data.places[chosen]);
  return `#${state}`;
}

// Set the form from the address. Returns whether that has a choice in it, and not only the name of a section.
function readAddress() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const control of controls) {
    control.value = state.get(control.name) ?? initial[control.name];
    if (control.selectedIndex === -1) control.value = initial[control.name]; // unknown
  }
  chosen = state.has("image") ? data.places.indexOf(Number(state.get("image"))) : null;
  return location.hash.includes("=");
}

// Show what the form says, and add it to the browser's history, unless it is there already.
function choose(changes = {}, {scroll = false} = {}) {
  for (const [name, text] of Object.entries(changes)) form.elements[name].value = text;
  chosen = null;
  show();
  history.pushState(null, "", address());
  if (!scroll) return;
  byId("count").scrollIntoView();
  gallery.querySelector("[tabindex='0']")?.focus({preventScroll: true});
}

function show() {
  const [second] = data.runs.filter((run) => run.name !== value("run"));
  if (!value("other") && /only|neither/.test(value("show"))) form.elements.other.value = second.name;
  showGallery();
  if (byId("run-again").dataset.drawn !== value("run")) showRun();
}

// The test that an image passes if its class is the one that is called `text`, or in the superclass "all ...".
function classTest(text) {
  return (label) => text === "" || data.names[label] === text || `all ${superclass(label)}` === text;
}

const isNumber = (search) => /^\d+$/.test(search);

function filter() {
  const [run, other] = [value("run"), value("other")], search = value("search").trim().toLowerCase();
  const isLabel = classTest(value("label")), isGuess = classTest(value("guess"));
  const passes = {
    all: () => true, wrong: (image) => !isRight(run, image), right: (image) => isRight(run, image),
    "only-this": (image) => isRight(run, image) && !isRight(other, image),
    "only-other": (image) => !isRight(run, image) && isRight(other, image),
    neither: (image) => !isRight(run, image) && !isRight(other, image),
  }[value("show")];
  if (isNumber(search)) return images.filter((image) => data.places[image] === Number(search)); // whatever it shows
  const matches = (image) => `${data.names[labels[image]]}, ${superclass(labels[image])}`.toLowerCase().includes(search);
  const direction = value("order") === "sure" ? -1 : 1;
  return images.filter((image) => isLabel(labels[image]) && isGuess(guessOf(run, image)[0]) && passes(image)
                                  && matches(image))
    .sort((a, b) => direction * (guessOf(run, a)[1] - guessOf(run, b)[1]));
}

// ---- The gallery

const gallery = byId("gallery");
const observer = new IntersectionObserver(([end]) => {
  if (end.isIntersecting && gallery.childElementCount < found.length) showMore();
}, {root: gallery.parentElement, rootMargin: "600px"});

function outcome(run, image) {
  const [guess] = guessOf(run, image), label = labels[image];
  return data.names[label] + (guess === label ? ", correct" : `, taken for ${data.names[guess]}`);
}

function tile(image) {
  const run = value("run"), other = value("other"), [guess, percent] = guessOf(run, image), label = labels[image];
  const second = guess !== label ? `is ${data.names[label]}`
    : other ? `B: ${data.names[guessOf(other, image)[0]]}` : `${percent}%`;
  const button = make("button", {type: "button", className: "tile", role: "option", tabIndex: -1},
    pictureOf(image),
    make("span", {className: guess === label ? "guess" : "guess wrong"},
         `${guess === label ? "✓" : "✗"} ${data.names[guess]}`),
    make("span", {}, second));
  button.dataset.image = image;
  button.ariaLabel = button.title = `${outcome(run, image)}, ${percent}%`;
  button.ariaSelected = "false";
  return button;
}

function showMore() {
  const shown = gallery.childElementCount;
  gallery.append(...found.slice(shown, shown + PAGE).map(tile));
  observer.unobserve(byId("end")); // so that it looks again: the end may still be in view
  observer.observe(byId("end"));
}

function showGallery() {
  found = filter();
  gallery.replaceChildren();
  gallery.parentElement.scrollTop = 0;
  showMore();
  const right = found.filter((image) => isRight(value("run"), image)).length;
  const of = isNumber(value("search")) ? "" : (value("label") && ` of ${value("label")}`)
    + (value("guess") && ` taken for ${value("guess")}`);
  byId("count").textContent = found.length === 0 ? "no image passes all filters"
    : `${found.length.toLocaleString("en")} image${found.length === 1 ? "" : "s"}${of}` +
      (value("show") === "all" ? `; ${value("run")} is right on ${right.toLocaleString("en")}` : "");
  byId("details").hidden = found.length === 0;
  if (chosen === null || !found.includes(chosen)) chosen = found[0] ?? null;
  while (gallery.childElementCount <= found.indexOf(chosen)) showMore();
  if (chosen !== null) select(gallery.children[found.indexOf(chosen)]);
}

// Make a tile the one that is selected, the only one that the tab key stops at, and show its details.
function select(button) {
  const before = gallery.querySelector("[aria-selected=true]");
  if (before) [before.ariaSelected, before.tabIndex] = ["false", -1];
  [button.ariaSelected, button.tabIndex] = ["true", 0];
  chosen = Number(button.dataset.image);
  showDetails(chosen);
}

function topFive(run, image) {
  const list = make("ol");
  for (let i = 0; i < data.guesses; i++) {
    const [guess, percent] = guessOf(run, image, i);
    const item = make("li", {className: guess === labels[image] ? "label" : ""},
                      make("span", {}, data.names[guess]), make("span", {}, percent ? `${percent}%` : "<1%"));
    item.style.setProperty("--share", `${percent}%`);
    list.append(item);
  }
  return list;
}

function showDetails(image) {
  const runs = [value("run"), value("other")].filter((run, i, all) => run && all.indexOf(run) === i);
  byId("details").replaceChildren(pictureOf(image),
    make("div", {}, make("h3", {}, outcome(value("run"), image)),
         make("p", {}, `test image ${data.places[image]}, ${superclass(labels[image])}`)),
    make("div", {className: "guesses"}, ...runs.map((run) => make("div", {}, make("h4", {}, run), topFive(run, image)))));
  const copy = copies.indexOf(image);
  if (copy !== -1)
    byId("details").append(make("div", {className: "copy"}, picture("copies", copy),
      `nearly repeats this training image, which is labeled ${data.copies[image]}`));
}

function remember() { history.replaceState(null, "", address()); }

gallery.addEventListener("click", ({target}) => {
  const button = target.closest(".tile");
  if (button) [select(button), button.focus(), remember()];
});

gallery.addEventListener("keydown", (event) => {
  const tiles = [...gallery.children], at = tiles.indexOf(event.target.closest(".tile"));
  const columns = getComputedStyle(gallery).gridTemplateColumns.split(" ").length;
  const to = {ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + columns, ArrowUp: at - columns,
              PageDown: at + 5 * columns, PageUp: at - 5 * columns, Home: 0, End: found.length - 1}[event.key];
  if (to === undefined || at === -1) return;
  event.preventDefault();
  const next = event.key.startsWith("Page") ? Math.min(Math.max(to, 0), found.length - 1) : to;
  while (gallery.childElementCount <= Math.min(next, found.length - 1)) showMore();
  const button = gallery.children[next];
  if (button) [select(button), button.focus(), remember()];
});

form.addEventListener("change", ({target}) => target.name !== "search" && choose());
form.addEventListener("input", ({target}) => {
  if (target.name === "search") [chosen = null, show(), remember()];
});
form.addEventListener("reset", () => setTimeout(() => choose()));
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("popstate", () => { if (readAddress() || !location.hash) show(); });

// ---- Where a run goes wrong: confused pairs, confusion matrix, accuracy by class, reliability

const CELL = 8; // pixels of the canvas
const PAIRS = 24;
const classes = images.map((image) => labels[image]).filter((label, i, all) => label !== all[i - 1]);
const ordered = [...data.names.keys()].sort((a, b) => data.superclassOf[a] - data.superclassOf[b] || a - b);
let confusion, cell = [0, 0];

const percentOf = (part, all) => all ? Math.round(100 * part / all) : 0;

function showRun() {
  const run = value("run"), names = data.names;
  byId("run-again").value = byId("run-again").dataset.drawn = run;
  confusion = names.map(() => Array(names.length).fill(0));
  for (const image of images) confusion[labels[image]][guessOf(run, image)[0]]++;

  const pairs = classes.flatMap((label) => names.map((_, guess) => [label, guess, confusion[label][guess]]))
    .filter(([label, guess, count]) => label !== guess && count).sort((a, b) => b[2] - a[2]).slice(0, PAIRS);
  byId("pairs").replaceChildren(...pairs.map(([label, guess, count]) => {
    const surest = images.filter((image) => labels[image] === label && guessOf(run, image)[0] === guess)
      .reduce((a, b) => guessOf(run, b)[1] > guessOf(run, a)[1] ? b : a);
    const shown = superclass(label) === "people" ? [] : [pictureOf(surest)]; // not all are fit for every screen
    const button = make("button", {type: "button"}, ...shown,
      make("span", {}, `${names[label]} taken for ${names[guess]}`, make("br"),
           make("small", {}, `${count} of ${data.counts[label]} images`)));
    button.addEventListener("click", () => openPair(label, guess));
    return button;
  }));

  const accuracy = (label) => percentOf(confusion[label][label], data.counts[label]);
  byId("classes").replaceChildren(...[...classes].sort((a, b) => accuracy(a) - accuracy(b)).map((label) => {
    const button = make("button", {type: "button"}, make("span", {}, names[label]), make("b", {}, `${accuracy(label)}`));
    button.style.setProperty("--share", `${accuracy(label)}%`);
    button.addEventListener("click", () => choose({label: names[label], guess: "", show: "wrong", search: ""},
                                                  {scroll: true}));
    return button;
  }));
  drawMatrix();
  drawReliability(run);
}

function openPair(label, guess) {
  const show = label === guess ? "right" : "wrong";
  choose({label: data.names[label], guess: data.names[guess], show, search: ""}, {scroll: true});
}

function drawMatrix() {
  const canvas = byId("matrix").firstElementChild, context = canvas.getContext("2d"), size = ordered.length;
  const style = getComputedStyle(document.documentElement), color = (name) => style.getPropertyValue(name);
  const most = Math.max(1, ...ordered.flatMap((label) => confusion[label].filter((_, guess) => guess !== label)));
  canvas.width = canvas.height = CELL * size;
  ordered.forEach((label, row) => ordered.forEach((guess, column) => {
    context.globalAlpha = Math.sqrt(confusion[label][guess] / (label === guess ? data.counts[label] || 1 : most));
    context.fillStyle = color(label === guess ? "--right" : "--wrong");
    context.fillRect(CELL * column, CELL * row, CELL, CELL);
  }));
  context.globalAlpha = 1;
  context.fillStyle = color("--line");
  ordered.forEach((label, at) => {
    if (at === 0 || data.superclassOf[label] === data.superclassOf[ordered[at - 1]]) return;
    context.fillRect(CELL * at, 0, 1, CELL * size);
    context.fillRect(0, CELL * at, CELL * size, 1);
  });
  const numbered = (named) => data.superclasses.map((name, coarse) => {
    const item = make("li", {}, ...(named ? [make("span", {}, `${name} · `)] : []), `${coarse + 1}`);
    item.style.setProperty("--classes", data.superclassOf.filter((of) => of === coarse).length);
    return item;
  });
  byId("superclasses").replaceChildren(...numbered(true));
  byId("columns").replaceChildren(...numbered(false));
  byId("matrix").style.setProperty("--all", size);
  showCell(cell);
  byId("cell").hidden = true;
}

// Name the pair and the count of a cell, and frame it.
function showCell([row, column]) {
  cell = [row, column].map((at) => Math.min(Math.max(at, 0), ordered.length - 1));
  const [label, guess] = cell.map((at) => ordered[at]), frame = byId("cell");
  byId("cell-text").textContent = `${data.names[label]} ${label === guess ? "recognized" : `taken for ${data.names[guess]}`}: `
    + `${confusion[label][guess]} of ${data.counts[label]} images`;
  frame.hidden = false;
  [frame.style.top, frame.style.left] = cell.map((at) => `${100 * at / ordered.length}%`);
}

// The cell under the pointer; under a finger, which covers several, the fullest of those that are not right.
function cellAt({clientX, clientY, pointerType}) {
  const box = byId("matrix").getBoundingClientRect(), size = ordered.length;
  const row = Math.floor(size * (clientY - box.top) / box.height);
  const column = Math.floor(size * (clientX - box.left) / box.width);
  const reach = pointerType === "touch" ? 2 : 0, near = [];
  for (let down = -reach; down <= reach; down++)
    for (let right = -reach; right <= reach; right++) near.push([row + down, column + right]);
  const weight = ([r, c]) => r === c ? 0 : confusion[ordered[r]]?.[ordered[c]] ?? 0;
  return near.reduce((a, b) => weight(b) > weight(a) ? b : a, [row, column]);
}

const openCell = () => openPair(ordered[cell[0]], ordered[cell[1]]);

byId("matrix").addEventListener("pointermove", (event) => showCell(cellAt(event)));
byId("matrix").addEventListener("click", (event) => { showCell(cellAt(event)); openCell(); });
byId("matrix").addEventListener("focus", () => showCell(cell));
byId("matrix").addEventListener("keydown", (event) => {
  const [down, right] = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key] ?? [];
  if (event.key === "Enter") openCell();
  if (down === undefined) return;
  event.preventDefault();
  showCell([cell[0] + down, cell[1] + right]);
});

// Accuracy against confidence in ten bins, those with 20 images or more, as a drawing of 320 x 230.
function drawReliability(run) {
  const bins = Array.from({length: 10}, () => ({count: 0, right: 0, confidence: 0}));
  for (const image of images) {
    const percent = guessOf(run, image)[1], bin = bins[Math.min(Math.floor(percent / 10), 9)];
    bin.count++;
    bin.right += isRight(run, image);
    bin.confidence += percent;
  }
  const x = (percent) => 45 + 2.6 * percent, y = (percent) => 190 - 1.8 * percent;
  const marks = bins.filter((bin) => bin.count >= 20).map(({count, right, confidence}) => {
    const [at, accuracy] = [confidence / count, 100 * right / count];
    return `<circle cx="${x(at)}" cy="${y(accuracy)}" r="4" fill="var(--right)"><title>${count} images: confidence ` +
      `${at.toFixed(0)}%, accuracy ${accuracy.toFixed(0)}%</title></circle>` +
      `<text x="${x(at)}" y="${y(accuracy) - 7}" text-anchor="middle" font-size="8">${count}</text>`;
  });
  const ticks = [0, 25, 50, 75, 100].map((percent) =>
    `<path d="M${x(0)} ${y(percent)}H${x(100)}" stroke="var(--line)"/><text x="${x(percent)}" y="205"
     text-anchor="middle">${percent}</text><text x="40" y="${y(percent) + 4}" text-anchor="end">${percent}</text>`);
  const all = bins.reduce((sum, bin) => sum + bin.confidence, 0) / images.length;
  const right = bins.reduce((sum, bin) => sum + bin.right, 0) / images.length * 100;
  const finding = `${run} is ${all.toFixed(1)}% sure on average and right on ${right.toFixed(1)}% of the images.`;
  byId("reliability-text").textContent =
    `${finding} Above the line it is right more often than its confidence suggests, below it less often. ` +
    "The numbers count images.";
  byId("reliability").innerHTML = `<svg viewBox="0 0 320 230" role="img">${
    ticks.join("")}<path d="M${x(0)} ${y(0)}L${x(100)} ${y(100)}" stroke="var(--quiet)" stroke-dasharray="3"/>${
    marks.join("")}<text x="175" y="222" text-anchor="middle">confidence (%)</text><text x="-100" y="12"
    text-anchor="middle" transform="rotate(-90)">accuracy (%)</text></svg>`;
  byId("reliability").firstElementChild.ariaLabel = finding;
}

byId("run-again").addEventListener("change", ({target}) => choose({run: target.value}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMatrix);

// A link of the bar of contents must not replace what the address says about the images.
document.querySelector("nav").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const heading = document.querySelector(link.hash);
  heading.tabIndex = -1;
  heading.scrollIntoView();
  heading.focus({preventScroll: true});
});

const initial = Object.fromEntries(new FormData(form));
const linked = readAddress();
show();
if (linked) byId("count").scrollIntoView();
