// A patch is chosen on a photograph or a cosine map; the maps show its cosines with every patch.
// The place is kept in the address (#image-2@5,7: row 5, column 7), so that it can be shared.
"use strict";

document.documentElement.classList.add("js");

function decode(view, numTokens) {
  const bytes = Uint8Array.from(atob(view.values), (letter) => letter.charCodeAt(0));
  const stored = new Int8Array(bytes.buffer);
  const count = view.scales.length;
  const values = new Float32Array(stored.length);
  for (let i = 0; i < stored.length; i++) values[i] = stored[i] * view.scales[i % count];
  return { values, count, numTokens };
}

function cosines({ values, count, numTokens }, place) {
  const found = new Float32Array(numTokens);
  for (let token = 0; token < numTokens; token++) {
    let sum = 0;
    for (let i = 0; i < count; i++) sum += values[token * count + i] * values[place * count + i];
    found[token] = sum;
  }
  found[place] = 1;
  return found;
}

function paint(found, [rows, columns], colors) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  found.forEach((cosine, token) => {
    const at = Math.min(Math.max(cosine, 0), 1) * (colors.length - 1);
    const below = Math.min(Math.floor(at), colors.length - 2);
    for (let i = 0; i < 3; i++) {
      const [low, high] = [colors[below][i], colors[below + 1][i]];
      pixels.data[4 * token + i] = Math.round(low + (high - low) * (at - below));
    }
    pixels.data[4 * token + 3] = 255;
  });
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}

function explore(article) {
  const content = JSON.parse(article.querySelector("script.features").textContent);
  const [rows, columns] = content.grid;
  const threshold = Number(article.dataset.threshold);
  const stages = [...article.querySelectorAll(".stage")];
  const readout = article.querySelector(".readout");
  const views = {};
  let [row, column] = content.default;

  function choose(newRow, newColumn, keep = true) {
    row = Math.min(Math.max(newRow, 0), rows - 1);
    column = Math.min(Math.max(newColumn, 0), columns - 1);
    for (const cursor of article.querySelectorAll(".cursor")) {
      cursor.style.left = `${(100 * column) / columns}%`;
      cursor.style.top = `${(100 * row) / rows}%`;
    }
    for (const figure of article.querySelectorAll("figure[data-view]")) {
      const title = figure.dataset.view;
      views[title] ??= decode(content.views[title], rows * columns);
      const found = cosines(views[title], row * columns + column);
      const picture = figure.querySelector("img");
      picture.src = paint(found, content.grid, content.colors);
      picture.alt = `Cosine of the patch in row ${row + 1}, column ${column + 1} with every patch, ${title}`;
      const share = found.reduce((sum, value) => sum + (value > threshold), 0) / found.length;
      figure.querySelector(".above").textContent = `${(100 * share).toFixed(1)} %`;
    }
    readout.textContent = `patch in row ${row + 1} of ${rows}, column ${column + 1} of ${columns}`;
    if (!keep) return;
    try {
      history.replaceState(null, "", `#${article.id}@${row + 1},${column + 1}`);
    } catch {
      // Some browsers refuse this for files; the page works without.
    }
  }

  function at(event, stage) {
    const box = stage.getBoundingClientRect();
    choose(
      Math.floor(((event.clientY - box.top) / box.height) * rows),
      Math.floor(((event.clientX - box.left) / box.width) * columns),
    );
  }

  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  for (const stage of stages) {
    stage.addEventListener("click", (event) => at(event, stage));
    stage.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse" && event.buttons === 1) at(event, stage);
    });
    stage.addEventListener("dragstart", (event) => event.preventDefault());
  }
  const photograph = stages[0];
  photograph.tabIndex = 0;
  photograph.setAttribute("role", "application");
  photograph.setAttribute("aria-label", "Choose a patch: arrow keys move, Home goes to the middle");
  photograph.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const move = moves[event.key];
    const far = event.shiftKey ? 5 : 1;
    if (move) choose(row + far * move[0], column + far * move[1]);
    else if (event.key === "Home") choose(...content.default);
    else return;
    event.preventDefault();
  });
  return choose;
}

const explorers = new Map();
for (const article of document.querySelectorAll("article.image")) {
  explorers.set(article.id, explore(article));
}

function followAddress() {
  const [, id, row, column] = /^#(image-\d+)@(\d+),(\d+)$/.exec(location.hash) ?? [];
  if (!explorers.has(id)) return;
  explorers.get(id)(row - 1, column - 1, false);
  document.getElementById(id).scrollIntoView();
}

window.addEventListener("hashchange", followAddress);
followAddress();
