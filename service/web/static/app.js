// The playground: a photograph goes to the service, its features come back as pictures.

import { colorize, similarityColors, spuriousColors } from "./colormap.js";
import { Panel, centreOf, indexAt, patchAt } from "./panel.js";
import { showReadout } from "./readout.js";
import { contentType, curlLine, featuresUrl, fetchFeatures, fetchInfo } from "./service.js";
import { cosinesTo, extent } from "./vectors.js";

const BORDERLESS = "Refined backbone, without its border";
const element = (id) => document.getElementById(id);

/** What the page shows. Points are {x, y} of the photograph, in [0, 1]. */
export const state = {
  choices: { raw: [], refined: [] }, // what the model selects offer
  file: null,
  raw: null, // answers of `fetchFeatures`, with `cosines` to the selected patch
  refined: null,
  selected: null,
  hovered: null,
};

const handlers = { onSelect: select, onHover: hover };
const panels = {
  photograph: new Panel("photograph", handlers),
  spurious: new Panel("spurious", handlers),
  raw: { colors: new Panel("raw-colors", handlers), cosines: new Panel("raw-cosines", handlers) },
  refined: { colors: new Panel("refined-colors", handlers), cosines: new Panel("refined-cosines", handlers) },
};
const sides = ["raw", "refined"];
const allPanels = [panels.photograph, panels.spurious, ...sides.flatMap((side) => Object.values(panels[side]))];
const colorsWorker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
let underWay = new AbortController();
let retry = null;

async function start() {
  try {
    offerModels(await fetchInfo());
  } catch (error) {
    if (error.code !== "not_ready") {
      showError(error, start);
      return;
    }
    showProgress("The service is loading its models; this page waits for it.");
    setTimeout(start, 1000 * error.retrySeconds);
    return;
  }
  if (state.file) await encode();
  else showStatus("Ready.");
}

function offerModels({ models, model: standard }) {
  const isRaw = ({ is_refined: isRefined }) => !isRefined;
  const refined = models.filter((model) => !isRaw(model));
  const plain = ({ name }) => ({ model: name, label: name, title: "Raw features", parameters: {} });
  const borderless = ({ name }) => ({
    model: name, label: `${name} without its border`, title: BORDERLESS, parameters: { register_width: 0 },
  });
  state.choices.raw = [...models.filter(isRaw).map(plain), ...refined.map(borderless)];
  state.choices.refined = refined.map(({ name }) => ({
    model: name, label: name, title: "Refined features", parameters: { include: "spurious" },
  }));
  for (const side of sides) {
    const offered = state.choices[side].map(({ label }, index) => new Option(label, index));
    element(`${side}-model`).replaceChildren(...(offered.length ? offered : [new Option("none is served", "")]));
    element(`${side}-model`).disabled = !offered.length;
  }
  if (!refined.length) element("curl").closest("section").querySelector("[value=raw]").checked = true;
  const [height, width] = standard.native_size;
  element("size").options[element("size").options.length - 1].text = `native, ${height} × ${width}`;
  element("no-raw-model").hidden = models.some(isRaw);
  showTitles();
  showCommand();
}

function choiceOf(side) {
  return state.choices[side][element(`${side}-model`).value] ?? null;
}

function urlOf(side) {
  const { model, parameters } = choiceOf(side);
  return featuresUrl({ model, size: element("size").value, dtype: element("dtype").value, parameters });
}

async function open(file) {
  if (!file) return;
  state.file = file;
  state.selected = null;
  forget();
  clearPictures();
  showCommand();
  await showPhotograph(file);
  if (state.choices.raw.length) await encode();
}

/** Ask for the features of both sides and show them. */
async function encode() {
  const { file } = state;
  forget();
  underWay = new AbortController();
  const { signal } = underWay;
  showProgress(`Encoding ${file.name}…`);
  try {
    const asked = sides.filter(choiceOf);
    const answers = await Promise.all(asked.map((side) => fetchFeatures(urlOf(side), file, signal)));
    signal.throwIfAborted();
    asked.forEach((side, index) => (state[side] = answers[index]));
    showProgress("Computing colours…");
    const colors = await principalColors(asked.map((side) => state[side]), signal);
    asked.forEach((side, index) => panels[side].colors.drawPatches(colors[index], state[side].grid));
  } catch (error) {
    if (error.name !== "AbortError") {
      forget();
      showError(error, encode);
    }
    return;
  }
  showAnswers();
}

/** Colours of each answer's patches: one basis for all when their channels agree. */
async function principalColors(answers, signal) {
  const share = answers.every(({ channels }) => channels === answers[0].channels);
  const groups = share ? [answers] : answers.map((answer) => [answer]);
  const colors = [];
  for (const group of groups) {
    colors.push(...(await inWorker({ sets: group.map(({ units }) => units), channels: group[0].channels })));
    signal.throwIfAborted();
  }
  return colors;
}

function inWorker(message) {
  // Answers come in the order of the questions, and carry the channel they belong to.
  const { port1, port2 } = new MessageChannel();
  return new Promise((resolve, reject) => {
    port1.onmessage = ({ data }) => resolve(data);
    colorsWorker.onerror = () => reject(new Error("The colours could not be computed; reload the page."));
    colorsWorker.postMessage(message, [port2]);
  }).finally(() => port1.close());
}

function showAnswers() {
  const main = state.refined ?? state.raw;
  const [height, width] = main.originalSize;
  document.documentElement.style.setProperty("--aspect", width / height);
  for (const panel of [panels.photograph, panels.spurious]) panel.useGrid(main.grid);
  panels.photograph.note.textContent = `${state.file.name}, ${width} × ${height} px`;
  for (const side of sides.filter((name) => state[name])) {
    const { grid, channels, milliseconds, isCached } = state[side];
    for (const panel of Object.values(panels[side])) panel.useGrid(grid);
    const time = `${Math.round(milliseconds)} ms${isCached ? ", cached" : ""}`;
    panels[side].colors.note.textContent = `${grid[0]} × ${grid[1]} patches of ${channels} channels, ${time}`;
  }
  element("photograph").parentElement.classList.remove("waiting");
  showSpurious();
  // The middle of the picture, until somebody chooses: an empty map would explain nothing.
  select(state.selected ?? centreOf(main.grid.map((count) => Math.floor(count / 2)), main.grid));
  showStatus("Click a patch to see which others resemble it.");
}

function showSpurious() {
  const scores = state.refined?.spurious?.[element("score").value];
  if (!scores) return;
  const range = extent(scores);
  panels.spurious.drawPatches(colorize(scores, spuriousColors, range), state.refined.grid);
  panels.spurious.showLegend(spuriousColors, range);
}

function select(point) {
  state.selected = point;
  const answers = sides.map((side) => state[side]).filter(Boolean);
  for (const answer of answers) {
    answer.cosines = cosinesTo(indexAt(point, answer.grid), answer.units, answer.channels);
  }
  // One scale for both: the same colour is the same cosine.
  const [low] = extent(...answers.map(({ cosines }) => cosines));
  const range = [Math.min(low, 0.99), 1];
  for (const side of sides.filter((name) => state[name])) {
    const { cosines, grid } = state[side];
    panels[side].cosines.drawPatches(colorize(cosines, similarityColors, range), grid);
    panels[side].cosines.showLegend(similarityColors, range);
  }
  for (const panel of allPanels) panel.mark("selected", point);
  const [row, column] = patchAt(point, (state.refined ?? state.raw).grid);
  element("announcement").textContent = `Row ${row}, column ${column} selected.`;
  showNumbers();
}

function hover(point) {
  state.hovered = point;
  for (const panel of allPanels) panel.mark("hovered", point);
  showNumbers();
}

function showNumbers() {
  showReadout(state, sides);
}

/** Give up what was asked and forget what was answered; the pictures stay until the next come. */
function forget() {
  underWay.abort();
  state.raw = state.refined = state.hovered = null;
  element("photograph").parentElement.classList.add("waiting");
  for (const panel of allPanels) {
    panel.useGrid(null);
    panel.mark("hovered", null);
    panel.mark("selected", null);
  }
  showNumbers();
}

function clearPictures() {
  for (const panel of allPanels.slice(1)) {
    panel.drawPatches(null);
    panel.say(panel.explanation);
    if (panel.legend) panel.showLegend(null, null);
    else panel.note.textContent = "\u00a0";
  }
  showTitles();
}

async function showPhotograph(file) {
  panels.photograph.note.textContent = file.name;
  try {
    const bitmap = await createImageBitmap(file);
    if (file !== state.file) return;
    document.documentElement.style.setProperty("--aspect", bitmap.width / bitmap.height);
    panels.photograph.drawPhotograph(bitmap);
  } catch {
    panels.photograph.drawPatches(null);
    panels.photograph.say("This browser cannot show the file. The service reads more formats.");
  }
}

function showTitles() {
  panels.raw.colors.title = choiceOf("raw")?.title ?? "Raw features";
  if (choiceOf("refined") || !state.choices.raw.length) return;
  for (const panel of [panels.refined.colors, panels.refined.cosines, panels.spurious]) {
    panel.say("No refined model is served.");
  }
}

function showCommand() {
  const side = document.querySelector("[name=curl]:checked").value;
  if (!choiceOf(side)) return;
  const type = state.file ? contentType(state.file) : "image/jpeg";
  element("curl").textContent = curlLine(urlOf(side), state.file?.name ?? "photo.jpg", type);
}

function showStatus(text, { busy = false, error = null } = {}) {
  element("progress").hidden = !busy;
  element("status").textContent = text;
  element("status").hidden = Boolean(error);
  element("error").hidden = !error;
  element("retry").hidden = !error?.retryable;
  element("error").replaceChildren(error?.message ?? "");
  if (error?.reference) {
    const reference = document.createElement("small");
    reference.textContent = error.reference;
    element("error").append(" ", reference);
  }
}

function showProgress(text) {
  showStatus(text, { busy: true });
}

function showError(error, again) {
  retry = again;
  clearPictures();
  showStatus("", { error });
}

async function copyCommand() {
  const text = element("curl").textContent;
  const button = element("copy");
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Browsers offer the clipboard over https and on localhost alone: leave the last step to the reader.
    getSelection().selectAllChildren(element("curl"));
    button.textContent = "Press Ctrl+C";
  }
  setTimeout(() => (button.textContent = "Copy"), 2500);
}

function imageIn(transfer) {
  return [...(transfer?.files ?? [])][0];
}

element("file").addEventListener("change", ({ target }) => {
  open(target.files[0]);
  target.value = ""; // so that the same file can be chosen again
});
for (const id of ["size", "dtype", "raw-model", "refined-model"]) {
  element(id).addEventListener("change", () => {
    showTitles();
    showCommand();
    if (state.file) encode();
  });
}
for (const radio of document.querySelectorAll("[name=curl]")) radio.addEventListener("change", showCommand);
element("score").addEventListener("change", showSpurious);
element("retry").addEventListener("click", () => retry());
element("copy").addEventListener("click", copyCommand);
document.querySelector(".toolbar").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("paste", ({ clipboardData }) => open(imageIn(clipboardData)));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  open(imageIn(event.dataTransfer));
});

showNumbers();
start();
