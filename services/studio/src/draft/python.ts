/** A draft's edits as the Python client has them. */

import { DataType, WordForm, WordPolicy } from "backpack-serving-client/backpack_proto/v1/edits";
import type { EditInit } from "./line";
import { literal } from "../parts/words";

type Of<K> = Extract<NonNullable<EditInit["kind"]>, { case: K }>["value"];
type AnyCells = NonNullable<Of<"scale">["cells"]>;
type AnyWord = NonNullable<Of<"copy">["source"]>;
type AnyVector = NonNullable<Of<"add">["delta"]>;

/** Edits as a list, and the names of the client that it needs. */
export function pythonEdits(edits: EditInit[]): { list: string; names: string[] } {
  const names = new Set<string>();
  const made = edits.map(({ kind }) => python(kind, names));
  return { list: `[${made.join(", ")}]`, names: [...names].sort() };
}

function python(kind: EditInit["kind"], names: Set<string>): string {
  const call = (name: string, ...given: (string | undefined)[]) => {
    names.add(name);
    return `${name}(${given.filter((one) => one !== undefined).join(", ")})`;
  };
  const cells = (some: AnyCells = []) => {
    const made = some.map(({ word, senses }) => {
      const numbers = senses?.length ? `(${senses.join(", ")}${senses.length === 1 ? "," : ""})` : undefined;
      return call("Cells", spelled(word), numbers, ...options(word, WordForm.INNER));
    });
    return made.length === 1 ? made[0]! : `[${made.join(", ")}]`;
  };
  switch (kind?.case) {
    case "scale":
      return call("Scale", cells(kind.value.cells), number(kind.value.factor));
    case "copy":
      return call("Copy", cells(kind.value.cells), spelled(kind.value.source), kind.value.sourceSense?.toString());
    case "swap":
      return call("Swap", cells(kind.value.cells), spelled(kind.value.old), spelled(kind.value.new));
    case "projectOut":
      return call("ProjectOut", cells(kind.value.cells), spelled(kind.value.direction));
    case "topic": {
      const { words, strength, constant } = kind.value;
      return call("Topic", listOf(words), number(strength), constant ? "constant=True" : undefined);
    }
    case "bias":
      return call(
        "Bias",
        listOf(kind.value.words),
        number(kind.value.amount),
        ...options(kind.value.words?.[0], WordForm.BOTH),
      );
    case "add":
      return call("Add", cells(kind.value.cells), numbers(kind.value.delta));
    case "set":
      return call("Set", cells(kind.value.cells), numbers(kind.value.vector));
    default:
      return "...";
  }
}

function listOf(words: AnyWord[] = []): string {
  return `[${words.map(spelled).join(", ")}]`;
}

function spelled(one: AnyWord | undefined): string {
  return one?.token === undefined ? literal(one?.text ?? "") : String(one.token);
}

const FORMS: Partial<Record<WordForm, string>> = {
  [WordForm.INNER]: "inner",
  [WordForm.INITIAL]: "initial",
  [WordForm.BOTH]: "both",
};
const POLICIES: Partial<Record<WordPolicy, string>> = {
  [WordPolicy.FIRST_TOKEN]: "first",
  [WordPolicy.LAST_TOKEN]: "last",
  [WordPolicy.ALL_TOKENS]: "all",
};

/** What a word says of its tokens, beside what it means without. */
function options(word: AnyWord | undefined, usual: WordForm): string[] {
  const form = word?.form || usual;
  const policy = POLICIES[word?.policy ?? WordPolicy.UNSPECIFIED];
  return [
    ...(policy ? [`tokens="${policy}"`] : []),
    ...(form === usual ? [] : [`form="${FORMS[form]}"`]),
    ...(word?.anyCase ? ["any_case=True"] : []),
  ];
}

function number(value = 0): string {
  return Number.isFinite(value) ? String(value) : `float("${value < 0 ? "-" : ""}inf")`;
}

function numbers(vector: AnyVector | undefined): string {
  const bytes = vector?.data ?? new Uint8Array();
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const size = vector?.dtype === DataType.FLOAT16 ? 2 : 4;
  const read = (at: number) => (size === 2 ? half(view.getUint16(at, true)) : view.getFloat32(at, true));
  const values = Array.from({ length: Math.floor(bytes.length / size) }, (_, at) =>
    Number(read(at * size).toPrecision(9)),
  );
  return `[${values.join(", ")}]`;
}

/** The number that 16 bits of IEEE 754 are. */
function half(bits: number): number {
  const exponent = (bits >> 10) & 0x1f;
  const fraction = (bits & 0x3ff) / 1024;
  const size = exponent ? (1 + fraction) * 2 ** (exponent - 15) : fraction * 2 ** -14;
  return bits & 0x8000 ? -size : size;
}
