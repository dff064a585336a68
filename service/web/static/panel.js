// One picture of the page: a canvas under a grid of patches that pointer and keys choose from.

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class Panel {
  /**
   * @param {string} id of the figure
   * @param {{onSelect: function, onHover: function}} handlers get a point of the picture,
   *     {x, y} in [0, 1]; `onHover` gets null when the pointer leaves
   */
  constructor(id, { onSelect, onHover }) {
    this.figure = document.getElementById(id);
    this.frame = this.figure.querySelector(".frame");
    this.canvas = this.frame.querySelector("canvas");
    this.empty = this.frame.querySelector(".empty");
    this.explanation = this.empty.textContent;
    this.note = this.figure.querySelector(".note");
    this.legend = this.figure.querySelector(".legend");
    this.grid = null;
    this.selected = null;
    this.marks = { hovered: this.#addMark("hovered"), selected: this.#addMark("selected") };
    this.frame.addEventListener("pointermove", (event) => this.grid && onHover(this.#pointAt(event)));
    this.frame.addEventListener("pointerleave", () => onHover(null));
    this.frame.addEventListener("click", (event) => this.grid && onSelect(this.#pointAt(event)));
    this.frame.addEventListener("keydown", (event) => {
      const step = ARROWS[event.key];
      if (!step || !this.grid || !this.selected) return;
      event.preventDefault();
      onSelect(this.#neighbour(step));
    });
  }

  set title(text) {
    this.figure.querySelector("h2").textContent = text;
    this.figure.querySelector("h2").title = text;
  }

  /** Say in the picture's place why there is none, or remove what stands there. */
  say(text) {
    this.empty.textContent = text;
    this.empty.hidden = !text;
  }

  /** Let patches of a grid of [rows, columns] be chosen; null: of none. */
  useGrid(grid) {
    this.grid = grid;
    if (grid) {
      this.frame.tabIndex = 0;
      this.frame.setAttribute("role", "application");
      this.frame.setAttribute("aria-roledescription", "grid of patches");
      const title = this.figure.querySelector("h2").textContent;
      this.frame.setAttribute("aria-label", `${title}, ${grid[0]} by ${grid[1]} patches`);
    } else {
      for (const name of ["tabindex", "role", "aria-roledescription", "aria-label"]) {
        this.frame.removeAttribute(name);
      }
    }
  }

  /** Draw one pixel per patch. `colors` is RGBA; null clears the picture. */
  drawPatches(colors, [rows, columns] = [1, 1]) {
    this.canvas.width = columns;
    this.canvas.height = rows;
    if (colors) {
      this.canvas.getContext("2d").putImageData(new ImageData(colors, columns, rows), 0, 0);
      this.say("");
    }
  }

  /** Draw a photograph, no larger than a screen can show. */
  drawPhotograph(bitmap) {
    const scale = Math.min(1, 1600 / Math.max(bitmap.width, bitmap.height));
    this.canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    this.canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    this.canvas.getContext("2d").drawImage(bitmap, 0, 0, this.canvas.width, this.canvas.height);
    this.say("");
  }

  /** Show what the ends of a table of 256 colours stand for; null clears it. */
  showLegend(table, range) {
    const [low, scale, high] = this.legend.children;
    low.textContent = range ? number(range[0]) : "";
    high.textContent = range ? number(range[1]) : "";
    const context = scale.getContext("2d");
    context.clearRect(0, 0, 256, 1);
    if (range) context.putImageData(new ImageData(Uint8ClampedArray.from(table.flat()), 256, 1), 0, 0);
  }

  /** Mark the patch at a point of the picture as `selected` or `hovered`; null: none. */
  mark(kind, point) {
    if (kind === "selected") this.selected = point;
    const mark = this.marks[kind];
    mark.hidden = !point || !this.grid;
    if (mark.hidden) return;
    const [rows, columns] = this.grid;
    const [row, column] = patchAt(point, this.grid);
    mark.style.left = `${(100 * column) / columns}%`;
    mark.style.top = `${(100 * row) / rows}%`;
    mark.style.width = `${100 / columns}%`;
    mark.style.height = `${100 / rows}%`;
  }

  #addMark(kind) {
    const mark = document.createElement("span");
    mark.className = `mark ${kind}`;
    mark.hidden = true;
    this.frame.append(mark);
    return mark;
  }

  #pointAt(event) {
    const box = this.frame.getBoundingClientRect();
    const at = { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
    return centreOf(patchAt(at, this.grid), this.grid);
  }

  #neighbour([down, right]) {
    const [row, column] = patchAt(this.selected, this.grid);
    const next = [row + down, column + right].map((value, axis) => Math.min(Math.max(value, 0), this.grid[axis] - 1));
    return centreOf(next, this.grid);
  }
}

/** [row, column] of the patch at a point {x, y} of a picture, both in [0, 1]. */
export function patchAt({ x, y }, [rows, columns]) {
  const within = (value, count) => Math.min(Math.max(Math.floor(value * count), 0), count - 1);
  return [within(y, rows), within(x, columns)];
}

/** Number of the patch at a point, counted row by row. */
export function indexAt(point, grid) {
  const [row, column] = patchAt(point, grid);
  return row * grid[1] + column;
}

/** The point in the middle of a patch. */
export function centreOf([row, column], [rows, columns]) {
  return { x: (column + 0.5) / columns, y: (row + 0.5) / rows };
}

/** A number with two decimals and a proper minus sign. */
export function number(value) {
  return value.toFixed(2).replace(/^-/, "\u2212").replace(/^\u22120\.00$/, "0.00");
}
