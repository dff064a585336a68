// The service as the page sees it: what it serves, features of a photograph, errors in words.

import { pageAddress } from "./address.js";
import { readSafetensors } from "./safetensors.js";
import { unitVectors } from "./vectors.js";

/** An answer that is no success. */
export class ServiceError extends Error {
  constructor(message, { status = 0, code = "", retryable = false, requestId = "", retrySeconds = 1 } = {}) {
    super(message);
    Object.assign(this, { status, code, retryable, requestId, retrySeconds });
  }

  /** `422 invalid_option, request 3f...`, for whoever reads the service's log; may be empty. */
  get reference() {
    const what = [this.status || "", this.code].filter(Boolean).join(" ");
    return this.requestId ? `${what}, request ${this.requestId}` : what;
  }
}

/**
 * What `/info` says.
 *
 * @throws {ServiceError}
 */
export async function fetchInfo() {
  const response = await send(new URL("info", pageAddress()), {});
  return response.json();
}

/** The address of a request for features. */
export function featuresUrl({ model, size, dtype, parameters }) {
  const url = new URL("features", pageAddress());
  const options = { model, ...(size && { size }), ...(dtype !== "float16" && { dtype }), ...parameters };
  // A slash in a model's name may stand as it is in a query, and reads better.
  url.search = new URLSearchParams(options).toString().replaceAll("%2F", "/");
  return url.href;
}

/** What a file is sent as; the service looks at the bytes, and says so if they are no image. */
export function contentType(file) {
  return file.type.startsWith("image/") ? file.type : "application/octet-stream";
}

/** The shell command that makes the same request. */
export function curlLine(url, name, type) {
  const stem = name.replace(/\.[^.]*$/, "") || "features";
  return [
    `curl -sSf -H ${quoted(`Content-Type: ${type}`)} --data-binary ${quoted(`@${name}`)}`,
    `-o ${quoted(`${stem}.safetensors`)} ${quoted(url)}`,
  ].join(" \\\n     ");
}

/**
 * Features of one photograph.
 *
 * @param {string} url from `featuresUrl`
 * @param {File} file
 * @returns {Promise<{grid: number[], channels: number, units: Float32Array,
 *     spurious: ?{registers: Float32Array, norm: Float32Array}, affine: number[][],
 *     originalSize: number[], milliseconds: number, isCached: boolean}>}
 *     `grid` is [rows, columns]; `units` the features at unit length, row after row
 * @throws {ServiceError} the service refused, or cannot be reached
 */
export async function fetchFeatures(url, file, signal) {
  const started = performance.now();
  const headers = { "content-type": contentType(file), accept: "application/x-safetensors" };
  const response = await send(url, { method: "POST", body: file, headers, signal });
  const buffer = await response.arrayBuffer();
  const milliseconds = performance.now() - started;
  const { metadata, tensors } = readSafetensors(buffer);
  const { grid, affine, original_size: originalSize } = JSON.parse(metadata.images)[0];
  const { shape, values } = tensors["features.0"];
  const channels = shape.at(-1);
  const scores = tensors["spurious.0"]?.values;
  return {
    grid,
    channels,
    units: unitVectors(values, channels),
    spurious: scores ? { registers: everySecond(scores, 0), norm: everySecond(scores, 1) } : null,
    affine,
    originalSize,
    milliseconds,
    isCached: response.headers.get("x-cache") === "hit",
  };
}

async function send(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(`The service does not answer at ${location.origin}. Is it running?`, { retryable: true });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const retrySeconds = Number(response.headers.get("retry-after")) || 1;
  const requestId = response.headers.get("x-request-id") ?? "";
  const { status } = response;
  try {
    const { message, code, retryable } = (await response.json()).error;
    return new ServiceError(sentence(message), { status, code, retryable, requestId, retrySeconds });
  } catch {
    // Not in the service's own form: something between the page and the service answered.
    const retryable = status === 429 || status >= 500;
    return new ServiceError(`The answer was ${status} ${response.statusText}.`, { status, retryable, requestId, retrySeconds });
  }
}

function sentence(message) {
  const upper = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(upper) ? upper : `${upper}.`;
}

function everySecond(values, first) {
  return Float32Array.from({ length: values.length / 2 }, (_, k) => values[2 * k + first]);
}

function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
