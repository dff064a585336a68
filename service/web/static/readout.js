// The table of numbers of the selected patch and of the one under the pointer.

import { indexAt, number, patchAt } from "./panel.js";

const COLUMNS = 8;

/** Write both rows of the table from the page's state. */
export function showReadout(state, sides) {
  for (const kind of ["selected", "hovered"]) {
    const row = document.getElementById(`${kind}-patch`);
    while (row.cells.length <= COLUMNS) row.insertCell();
    textsAt(state[kind], state, sides).forEach((text, index) => (row.cells[index + 1].textContent = text));
  }
}

function textsAt(point, state, sides) {
  const main = state.refined ?? state.raw;
  if (!point || !main) return Array(COLUMNS).fill("–");
  const [row, column] = patchAt(point, main.grid);
  const [[columnsPerPixel, , left], [, rowsPerPixel, top]] = main.affine;
  const value = (answer, values) => (values ? number(values[indexAt(point, answer.grid)]) : "–");
  return [
    row,
    column,
    pixels(column, columnsPerPixel, left),
    pixels(row, rowsPerPixel, top),
    ...sides.map((side) => value(state[side], state[side]?.cosines)),
    value(state.refined, state.refined?.spurious?.registers),
    value(state.refined, state.refined?.spurious?.norm),
  ];
}

/** The pixels of the photograph that a row or column of patches covers. */
function pixels(index, perPixel, shift) {
  return `${Math.round((index - shift) / perPixel)}–${Math.round((index + 1 - shift) / perPixel)}`;
}
