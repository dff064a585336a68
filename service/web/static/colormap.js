// Numbers as colours: dark is low, light is high, in steps that look even.

const SIMILARITY = [[12, 17, 46], [33, 61, 122], [28, 116, 145], [74, 170, 128], [184, 214, 104], [254, 250, 214]];
const SPURIOUS = [[16, 13, 32], [82, 30, 96], [168, 46, 92], [228, 101, 62], [249, 180, 88], [255, 246, 214]];

export const similarityColors = lookupTable(SIMILARITY);
export const spuriousColors = lookupTable(SPURIOUS);

/** RGBA of each value; `range` is what the table's ends stand for. */
export function colorize(values, table, [low, high]) {
  const stretch = 255 / Math.max(high - low, 1e-12);
  const colors = new Uint8ClampedArray(4 * values.length);
  values.forEach((value, k) => {
    const entry = Math.min(255, Math.max(0, Math.round((value - low) * stretch)));
    colors.set(table[entry], 4 * k);
  });
  return colors;
}

function lookupTable(stops) {
  return Array.from({ length: 256 }, (_, entry) => {
    const position = (entry / 255) * (stops.length - 1);
    const below = Math.min(Math.floor(position), stops.length - 2);
    const weight = position - below;
    return [...stops[below].map((value, c) => value + weight * (stops[below + 1][c] - value)), 255];
  });
}
