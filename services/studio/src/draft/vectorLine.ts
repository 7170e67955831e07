/** An edit that adds numbers to senses, or replaces them, as a line of a draft. */

import { create, toJson } from "backpack-serving-client";
import { DataType, EditSchema } from "backpack-serving-client/backpack_proto/v1/edits";
import { parseLine } from "./line";

/** `where` is WORDS[:SENSES]; `numbers` as many as the model is wide. Throws an Error for what is none. */
export function vectorLine(kind: "add" | "set", where: string, numbers: string, width: number): string {
  const values = numbers
    .split(/[\s,[\]]+/)
    .filter(Boolean)
    .map(Number);
  if (values.length !== width || values.some((value) => !Number.isFinite(value))) {
    throw new Error(`a vector of this model has ${width} numbers; there are ${values.filter(Number.isFinite).length}`);
  }
  const scaled = parseLine(`scale ${where} 1`).kind; // reads the cells
  const cells = scaled?.case === "scale" ? scaled.value.cells : [];
  const data = new Uint8Array(Float32Array.from(values).buffer); // little-endian on all that browsers run on
  const vector = { data, dtype: DataType.FLOAT32, shape: [width] };
  const edit = create(EditSchema, {
    kind: kind === "add" ? { case: "add", value: { cells, delta: vector } } : { case: "set", value: { cells, vector } },
  });
  return JSON.stringify(toJson(EditSchema, edit));
}
