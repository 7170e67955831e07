/** An edit as a line of text, such as `scale nurse:7 0`: as `backpack try --edit` takes it; or as JSON of the API. */

import { fromJson, type MessageInitShape } from "backpack-serving-client";
import { EditSchema, WordForm } from "backpack-serving-client/backpack_proto/v1/edits";
import { splitWords } from "./shellWords";

export type EditInit = MessageInitShape<typeof EditSchema>;

export const KINDS = {
  scale: { written: "WORDS[:SENSES] FACTOR", example: "nurse:7 0", effect: "v ← factor · v; 0 removes the senses" },
  copy: { written: "WORDS[:SENSES] SOURCE[:SENSE]", example: "king,queen ship", effect: "v ← a sense of another word" },
  swap: {
    written: "WORDS[:SENSES] OLD NEW",
    example: "nurse she he",
    effect: "what v said of one word, it says of another",
  },
  "project-out": {
    written: "WORDS[:SENSES] DIRECTION",
    example: "nurse she",
    effect: "v neither raises nor lowers a word",
  },
  topic: {
    written: "WORDS STRENGTH",
    example: "sea,ship,captain 2",
    effect: "texts lean towards the words until one appears",
  },
  bias: { written: "WORDS AMOUNT", example: "money -5", effect: "logit + amount, wherever the words could come next" },
  forbid: { written: "WORDS", example: "money,cash", effect: "the words never come" },
} as const;
export type Kind = keyof typeof KINDS;

/** Throws an Error that says how the edit is written. */
export function parseLine(line: string): EditInit {
  if (line.startsWith("{")) return fromJson(EditSchema, JSON.parse(line));
  const [kind = "", ...words] = splitWords(line);
  if (!(kind in KINDS)) {
    throw new Error(`“${line}” is no edit: there is no kind “${kind}”; there are ${Object.keys(KINDS).join(", ")}`);
  }
  const { written, example } = KINDS[kind as Kind];
  if (words.length !== written.split(" ").length) {
    throw new Error(`“${line}” is no edit: write ${kind} ${written}, such as “${kind} ${example}”`);
  }
  return { kind: READ[kind as Kind](words as [string, string, string]) };
}

type ReadKind = (words: [string, string, string]) => EditInit["kind"];

const READ: Record<Kind, ReadKind> = {
  scale: ([where, factor]) => ({ case: "scale", value: { cells: cells(where), factor: decimal(factor) } }),
  copy: ([where, from]) => ({ case: "copy", value: { cells: cells(where), ...source(from) } }),
  swap: ([where, old, next]) => ({
    case: "swap",
    value: { cells: cells(where), old: word(old), new: word(next) },
  }),
  "project-out": ([where, direction]) => ({
    case: "projectOut",
    value: { cells: cells(where), direction: word(direction) },
  }),
  topic: ([words, strength]) => ({
    case: "topic",
    value: { words: list(words).map(word), strength: decimal(strength) },
  }),
  bias: ([words, amount]) => ({ case: "bias", value: { words: both(list(words)), amount: decimal(amount) } }),
  forbid: ([words]) => ({ case: "bias", value: { words: both(list(words)), amount: -Infinity } }),
};

/** Words with commas between them, and after a colon their senses, such as 3 or 8,12-14. */
function cells(text: string) {
  const [words, senses] = parted(text);
  return both(list(words)).map((one) => ({ word: one, senses }));
}

function source(text: string) {
  const [named, senses] = parted(text);
  if (senses.length > 1 || list(named).length > 1)
    throw new Error(`“${text}” names more than one word or sense to copy`);
  return { source: word(named), ...(senses.length ? { sourceSense: senses[0] } : {}) };
}

function parted(text: string): [string, number[]] {
  const colon = text.lastIndexOf(":");
  return colon > 0 ? [text.slice(0, colon), senseNumbers(text.slice(colon + 1))] : [text, []];
}

function senseNumbers(text: string): number[] {
  return text.split(",").flatMap((part) => {
    const found = /^(\d{1,4})(?:-(\d{1,4}))?$/.exec(part);
    const first = Number(found?.[1]);
    const last = Number(found?.[2] ?? found?.[1]);
    if (!found || last < first) throw new Error(`“${part}” names no sense; write 3 or 8,12-14`);
    return Array.from({ length: last - first + 1 }, (_, at) => first + at);
  });
}

/** “ London” within a text and “London” at the start of one. */
function both(words: string[]) {
  return words.map((text) => ({ ...word(text), form: WordForm.BOTH }));
}

/** A word; `#ID` is the token with that id. */
function word(text: string) {
  return /^#\d{1,9}$/.test(text) ? { token: Number(text.slice(1)) } : { text };
}

function list(words: string): string[] {
  const found = words === "," ? [","] : words.split(",");
  if (found.some((word) => !word)) throw new Error(`“${words}” has an empty word`);
  return found;
}

function decimal(text: string): number {
  if (!text.trim() || Number.isNaN(Number(text))) throw new Error(`“${text}” is no number`);
  return Number(text);
}
