// Reads safetensors: a u64 header length, a JSON header, and the tensors' bytes.

const HALF_TO_FLOAT = new Float32Array(65536);
for (let bits = 0; bits < 65536; bits++) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) HALF_TO_FLOAT[bits] = fraction ? NaN : sign * Infinity;
  else if (exponent === 0) HALF_TO_FLOAT[bits] = sign * fraction * 2 ** -24;
  else HALF_TO_FLOAT[bits] = sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/**
 * The tensors of a safetensors file as float32.
 *
 * @param {ArrayBuffer} buffer the whole file
 * @returns {{metadata: Object<string, string>,
 *            tensors: Object<string, {shape: number[], values: Float32Array}>}}
 * @throws {Error} the bytes are not safetensors, or a tensor is neither float16 nor float32
 */
export function readSafetensors(buffer) {
  const headerLength = buffer.byteLength < 8 ? Infinity : readLength(buffer);
  if (8 + headerLength > buffer.byteLength) {
    throw new Error(`the answer's ${buffer.byteLength} bytes are not safetensors`);
  }
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, headerLength)));
  const { __metadata__: metadata = {}, ...entries } = header;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(entries)) {
    // A copy, because typed arrays must begin at a multiple of their element's size.
    const bytes = buffer.slice(8 + headerLength + begin, 8 + headerLength + end);
    tensors[name] = { shape, values: toFloats(bytes, dtype, name) };
  }
  return { metadata, tensors };
}

function readLength(buffer) {
  return Number(new DataView(buffer).getBigUint64(0, true));
}

function toFloats(bytes, dtype, name) {
  if (dtype === "F32") return new Float32Array(bytes);
  if (dtype === "F16") return Float32Array.from(new Uint16Array(bytes), (bits) => HALF_TO_FLOAT[bits]);
  throw new Error(`tensor ${name} is ${dtype}; this page reads F16 and F32`);
}
