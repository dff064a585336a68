// Principal components of many vectors, without forming their channel-by-channel covariance.
//
// Lanczos iteration on v -> X'X v, with X centred, and full reorthogonalisation: each step reads
// the vectors once, and a few dozen steps give the leading directions.

// Enough for what has structure. Noise has no leading directions to find: there it just ends.
const MAX_STEPS = 96;
const STEPS_BETWEEN_CHECKS = 8;
const TOLERANCE = 1e-7; // of the largest variance; a step of an 8-bit colour is 4e-3

/**
 * The directions of largest variance.
 *
 * The sign of a direction is such that its entry of largest magnitude is positive, so the same
 * vectors always give the same answer.
 *
 * @param {Float32Array[]} sets vectors, row after row; several sets share one basis
 * @param {number} channels length of a vector
 * @param {number} count how many directions, at most `channels`
 * @returns {{mean: Float64Array, directions: Float64Array[]}} unit directions, the largest first
 */
export function principalDirections(sets, channels, count) {
  const mean = meanVector(sets, channels);
  const krylov = [];
  const diagonal = [];
  const offDiagonal = [];
  const maxSteps = Math.min(channels, MAX_STEPS);
  let scale = 0;
  let next = startVector(krylov, channels);
  let ritz;
  while (next !== null) {
    krylov.push(next);
    const image = multiplyByScatter(sets, channels, mean, next);
    diagonal.push(dot(image, next));
    scale = Math.max(scale, Math.abs(diagonal.at(-1)));
    orthogonalize(image, krylov);
    let residual = Math.hypot(...image);
    // Within rounding of zero the space is closed: go on with any direction outside of it.
    if (residual <= 1e-12 * scale) residual = 0;
    const steps = krylov.length;
    if (steps === maxSteps || (steps >= count && (!residual || steps % STEPS_BETWEEN_CHECKS === 0))) {
      ritz = eigenpairsOfTridiagonal(diagonal, offDiagonal);
      const errors = ritz.slice(0, count).map(({ vector }) => Math.abs(residual * vector.at(-1)));
      if (steps === maxSteps || Math.max(...errors) <= TOLERANCE * scale) break;
    }
    offDiagonal.push(residual);
    next = residual ? image.map((value) => value / residual) : startVector(krylov, channels);
  }
  return { mean, directions: ritz.slice(0, count).map(({ vector }) => combine(krylov, vector)) };
}

/**
 * Coordinates of vectors along directions.
 *
 * @returns {Float32Array[]} one array per direction, with a value for each vector
 */
export function project(vectors, channels, { mean, directions }) {
  return directions.map((direction) => {
    const shift = dot(mean, direction);
    const values = new Float32Array(vectors.length / channels);
    for (let row = 0, start = 0; row < values.length; row++, start += channels) {
      values[row] = dotAt(vectors, start, direction) - shift;
    }
    return values;
  });
}

/**
 * Vectors as colours: their first three principal components are red, green and blue.
 *
 * Each component is stretched from its 1st to its 99th percentile over all sets, so that the
 * colours of sets that share a basis mean the same.
 *
 * @param {Float32Array[]} sets vectors, row after row
 * @returns {Uint8ClampedArray[]} RGBA of each vector, for each set
 */
export function principalColors(sets, channels) {
  const basis = principalDirections(sets, channels, Math.min(3, channels));
  const projected = sets.map((vectors) => project(vectors, channels, basis));
  const colors = sets.map((vectors) => new Uint8ClampedArray((4 * vectors.length) / channels).fill(255));
  basis.directions.forEach((_, component) => {
    const [low, high] = percentiles(projected.map((components) => components[component]));
    const stretch = 255 / Math.max(high - low, 1e-12);
    projected.forEach((components, set) => {
      components[component].forEach((value, row) => {
        colors[set][4 * row + component] = (value - low) * stretch;
      });
    });
  });
  return colors;
}

function percentiles(arrays) {
  const sorted = new Float32Array(arrays.reduce((sum, array) => sum + array.length, 0));
  let offset = 0;
  for (const array of arrays) {
    sorted.set(array, offset);
    offset += array.length;
  }
  sorted.sort();
  const last = sorted.length - 1;
  return [sorted[Math.round(0.01 * last)], sorted[Math.round(0.99 * last)]];
}

function meanVector(sets, channels) {
  const mean = new Float64Array(channels);
  let rows = 0;
  for (const vectors of sets) {
    for (let start = 0; start < vectors.length; start += channels, rows++) {
      for (let c = 0; c < channels; c++) mean[c] += vectors[start + c];
    }
  }
  return mean.map((sum) => sum / rows);
}

function multiplyByScatter(sets, channels, mean, vector) {
  const product = new Float64Array(channels);
  const shift = dot(mean, vector);
  let total = 0;
  for (const vectors of sets) {
    for (let start = 0; start < vectors.length; start += channels) {
      const sum = dotAt(vectors, start, vector) - shift;
      total += sum;
      for (let c = 0; c < channels; c++) product[c] += vectors[start + c] * sum;
    }
  }
  for (let c = 0; c < channels; c++) product[c] -= mean[c] * total;
  return product;
}

/** A unit vector, always the same, that is orthogonal to `others`; null if they fill the space. */
function startVector(others, channels) {
  if (others.length >= channels) return null;
  const vector = Float64Array.from({ length: channels }, (_, c) => Math.sin(1 + c * c + others.length));
  orthogonalize(vector, others);
  const norm = Math.hypot(...vector);
  return vector.map((value) => value / norm);
}

function orthogonalize(vector, others) {
  // Twice: the first pass leaves rounding errors of the size of what it removed.
  for (let pass = 0; pass < 2; pass++) {
    for (const other of others) {
      const overlap = dot(vector, other);
      for (let c = 0; c < vector.length; c++) vector[c] -= overlap * other[c];
    }
  }
}

function combine(vectors, weights) {
  const sum = new Float64Array(vectors[0].length);
  vectors.forEach((vector, k) => {
    for (let c = 0; c < sum.length; c++) sum[c] += weights[k] * vector[c];
  });
  const largest = sum.reduce((best, value) => (Math.abs(value) > Math.abs(best) ? value : best), 0);
  return largest < 0 ? sum.map((value) => -value) : sum;
}

/** Product of `vector` with the vector that begins at `start`. */
function dotAt(vectors, start, vector) {
  let sum = 0;
  for (let c = 0; c < vector.length; c++) sum += vectors[start + c] * vector[c];
  return sum;
}

function dot(left, right) {
  let sum = 0;
  for (let c = 0; c < left.length; c++) sum += left[c] * right[c];
  return sum;
}

/** Eigenpairs of a symmetric tridiagonal matrix by Jacobi rotations, the largest value first. */
function eigenpairsOfTridiagonal(diagonal, offDiagonal) {
  const size = diagonal.length;
  const matrix = diagonal.map((_, row) => new Float64Array(size));
  const vectors = diagonal.map((_, row) => new Float64Array(size));
  for (let k = 0; k < size; k++) {
    matrix[k][k] = diagonal[k];
    vectors[k][k] = 1;
    if (k + 1 < size) matrix[k][k + 1] = matrix[k + 1][k] = offDiagonal[k];
  }
  for (let sweep = 0; sweep < 40 && !isDiagonal(matrix); sweep++) {
    for (let p = 0; p < size; p++) {
      for (let q = p + 1; q < size; q++) rotate(matrix, vectors, p, q);
    }
  }
  const pairs = matrix.map((row, k) => ({ value: row[k], vector: vectors[k] }));
  return pairs.sort((left, right) => right.value - left.value);
}

function isDiagonal(matrix) {
  let largest = 0;
  let outside = 0;
  matrix.forEach((row, k) => {
    row.forEach((value, c) => {
      if (c === k) largest = Math.max(largest, Math.abs(value));
      else outside = Math.max(outside, Math.abs(value));
    });
  });
  return outside <= 1e-14 * largest;
}

/** Make entry (p, q) zero. `vectors` holds the eigenvectors as rows. */
function rotate(matrix, vectors, p, q) {
  if (matrix[p][q] === 0) return;
  const ratio = (matrix[q][q] - matrix[p][p]) / (2 * matrix[p][q]);
  const tangent = (ratio < 0 ? -1 : 1) / (Math.abs(ratio) + Math.hypot(1, ratio));
  const cosine = 1 / Math.hypot(1, tangent);
  const sine = tangent * cosine;
  for (const row of matrix) [row[p], row[q]] = turned(row[p], row[q], cosine, sine);
  for (const rows of [matrix, vectors]) {
    for (let c = 0; c < matrix.length; c++) {
      [rows[p][c], rows[q][c]] = turned(rows[p][c], rows[q][c], cosine, sine);
    }
  }
}

function turned(first, second, cosine, sine) {
  return [cosine * first - sine * second, sine * first + cosine * second];
}
