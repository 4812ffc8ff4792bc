// Check a dump against a golden, in JavaScript with no packages.
//
//     node read_golden.mjs GOLDEN.safetensors MINE.safetensors    every stage that both have
//     node read_golden.mjs GOLDEN.safetensors STAGE MINE.f32      one stage, raw float32
//
// It prints OK, or the first number that differs, stages in the order of the golden. It ends with 0
// (the same), 1 (different) or 2 (bad use, or a file that cannot be read). Names and layouts have to
// be the golden's, and numbers computed in float32; `npvlm compare` takes others.

import { readFileSync } from "node:fs";

// Of the root mean square of a stage: far above what float32 rounds off, below any mistake.
const LIMIT = 1e-4;

// How each type is read: its bytes, and the method of DataView.
const TYPES = {
  F32: [4, "getFloat32"],
  F64: [8, "getFloat64"],
  I64: [8, "getBigInt64"],
  I32: [4, "getInt32"],
  U8: [1, "getUint8"],
};

class Unreadable extends Error {}

function readFile(path) {
  try {
    return readFileSync(path);
  } catch (error) {
    throw new Unreadable(`${path} cannot be read (${error.code})`);
  }
}

function numbers(path, bytes, dtype) {
  if (!Object.hasOwn(TYPES, dtype)) {
    throw new Unreadable(`${path} has numbers that are ${dtype}, expected F32, F64, I64, I32 or U8`);
  }
  const [width, get] = TYPES[dtype];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  return Array.from({ length: bytes.length / width }, (_, i) => Number(view[get](i * width, true)));
}

// The stages of a file in its order: name -> { dtype, values }.
function readSafetensors(path) {
  const file = readFile(path);
  const start = file.length < 8 ? Infinity : 8 + Number(file.readBigUInt64LE(0));
  let header;
  try {
    header = JSON.parse(file.toString("utf8", 8, start > file.length ? 8 : start));
  } catch {
    throw new Unreadable(`${path} is no safetensors file`);
  }
  const stages = new Map();
  for (const [name, entry] of Object.entries(header ?? {})) {
    if (name === "__metadata__") continue;
    const { dtype, shape, data_offsets: place } = entry ?? {};
    if (!Array.isArray(shape) || !Array.isArray(place)) {
      throw new Unreadable(`${path} has a header that is none of safetensors`);
    }
    const values = numbers(path, file.subarray(start + place[0], start + place[1]), dtype);
    if (values.length !== shape.reduce((product, side) => product * side, 1)) {
      throw new Unreadable(`${path} is cut off or has a header of another file`);
    }
    stages.set(name, { dtype, values });
  }
  return stages;
}

function readRaw(path, name) {
  const file = readFile(path);
  if (file.length % 4) {
    throw new Unreadable(`${path} has a size that is no multiple of 4, expected raw float32`);
  }
  return new Map([[name, { dtype: "F32", values: numbers(path, file, "F32") }]]);
}

// What is wrong with a stage, in words; null where nothing is. Whole numbers have to be equal.
function difference(name, golden, mine) {
  const expected = golden.values;
  const found = mine.values;
  if (expected.length !== found.length) {
    return `${name}: expected ${expected.length} numbers, found ${found.length}`;
  }
  const size = Math.sqrt(expected.reduce((sum, x) => sum + x * x, 0) / expected.length);
  const most = golden.dtype.startsWith("F") ? LIMIT * size : 0;
  const at = expected.findIndex((x, i) => !(Math.abs(found[i] - x) <= most)); // a nan differs
  if (at < 0) return null;
  const error = Math.abs(found[at] - expected[at]) / size;
  const shown = [expected[at], found[at]].map((x) => Number(x.toPrecision(9)));
  return (
    `${name} at number ${at}: expected ${shown[0]}, found ${shown[1]}, ` +
    `relative error ${error.toPrecision(3)}`
  );
}

function main(args) {
  if (args.length !== 2 && args.length !== 3) {
    throw new Unreadable("usage: node read_golden.mjs GOLDEN.safetensors [STAGE] MINE");
  }
  const golden = readSafetensors(args[0]);
  const mine = args.length === 2 ? readSafetensors(args[1]) : readRaw(args[2], args[1]);
  const common = [...golden.keys()].filter((name) => mine.has(name));
  if (!common.length) throw new Unreadable(`${args.at(-1)} has no stage of the golden`);
  for (const name of common) {
    const wrong = difference(name, golden.get(name), mine.get(name));
    if (wrong) {
      console.log(`DIFFERENT: ${wrong}`);
      return 1;
    }
  }
  console.log(`OK: ${common.length} of the golden's ${golden.size} stages compared, all the same`);
  return 0;
}

try {
  process.exitCode = main(process.argv.slice(2));
} catch (error) {
  if (!(error instanceof Unreadable)) throw error;
  console.error(`read_golden: ${error.message}.`);
  process.exitCode = 2;
}
