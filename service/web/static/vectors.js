// What is computed from one image's feature vectors, row after row in a Float32Array.

/** The vectors at unit length; a vector of zeros stays one. */
export function unitVectors(vectors, channels) {
  const units = new Float32Array(vectors.length);
  for (let start = 0; start < vectors.length; start += channels) {
    let squares = 0;
    for (let c = 0; c < channels; c++) squares += vectors[start + c] ** 2;
    const inverse = squares ? 1 / Math.sqrt(squares) : 0;
    for (let c = 0; c < channels; c++) units[start + c] = vectors[start + c] * inverse;
  }
  return units;
}

/** Cosine of the vector at `index` with each vector. */
export function cosinesTo(index, units, channels) {
  const query = units.subarray(index * channels, (index + 1) * channels);
  const cosines = new Float32Array(units.length / channels);
  for (let row = 0, start = 0; row < cosines.length; row++, start += channels) {
    let sum = 0;
    for (let c = 0; c < channels; c++) sum += query[c] * units[start + c];
    cosines[row] = sum;
  }
  return cosines;
}

/** Smallest and largest of the values of several arrays. */
export function extent(...arrays) {
  let [low, high] = [Infinity, -Infinity];
  for (const array of arrays) {
    for (const value of array) {
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  return [low, high];
}
