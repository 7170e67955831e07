/** A patch file, as `backpack patch show` and `backpack lab` write it: edits as lines of JSON for a draft. */

import { fromJson, toJson } from "backpack-serving-client";
import { EditSchema } from "backpack-serving-client/backpack_proto/v1/edits";

/** Throws an Error for what is none, or was made for another model. */
export function readPatchFile(text: string, model: string | undefined): string[] {
  const read: unknown = JSON.parse(text);
  const file = Array.isArray(read) ? { edits: read } : (read as { edits?: unknown; model?: string });
  if (!Array.isArray(file.edits)) throw new Error("no list of edits, nor an object with one as “edits”");
  if (file.model && model && file.model !== model) {
    throw new Error(`the patch was made for model ${file.model.slice(0, 12)}…, this is ${model.slice(0, 12)}…`);
  }
  return file.edits.map((edit) => JSON.stringify(toJson(EditSchema, fromJson(EditSchema, spelledOut(edit)))));
}

type Json = Parameters<typeof fromJson>[1];

const WORDS = new Set(["word", "words", "source", "direction", "old", "new"]);

/** In a patch file a word may be a plain string. */
function spelledOut(value: Json, isWord = false): Json {
  if (typeof value === "string") return isWord ? { text: value } : value;
  if (Array.isArray(value)) return value.map((one) => spelledOut(one, isWord));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([name, one]) => [name, spelledOut(one, WORDS.has(name))]));
}
