/** A draft's edits as the Python client has them. */

import type { EditInit } from "./line";
import { literal } from "../parts/words";

type Of<K> = Extract<NonNullable<EditInit["kind"]>, { case: K }>["value"];
type AnyCells = NonNullable<Of<"scale">["cells"]>;
type AnyWord = NonNullable<Of<"copy">["source"]>;

/** Edits as a list, and the names that it needs. */
export function pythonEdits(edits: EditInit[]): { list: string; names: string[] } {
  const made = edits.map(({ kind }) => python(kind));
  const names = made.flatMap((text) => [...text.matchAll(/\b([A-Z]\w+)\(/g)].map((found) => found[1]!));
  return { list: `[${made.join(", ")}]`, names: [...new Set(names)].sort() };
}

function python(kind: EditInit["kind"]): string {
  switch (kind?.case) {
    case "scale":
      return `Scale(${cells(kind.value.cells)}, ${kind.value.factor})`;
    case "copy": {
      const sense = kind.value.sourceSense;
      return `Copy(${cells(kind.value.cells)}, ${word(kind.value.source)}${sense === undefined ? "" : `, ${sense}`})`;
    }
    case "swap":
      return `Swap(${cells(kind.value.cells)}, ${word(kind.value.old)}, ${word(kind.value.new)})`;
    case "projectOut":
      return `ProjectOut(${cells(kind.value.cells)}, ${word(kind.value.direction)})`;
    case "topic":
      return `Topic([${(kind.value.words ?? []).map(word).join(", ")}], ${kind.value.strength})`;
    case "bias": {
      const amount = kind.value.amount === -Infinity ? 'float("-inf")' : kind.value.amount;
      return `Bias([${(kind.value.words ?? []).map(word).join(", ")}], ${amount}, form="both")`;
    }
    case "add":
      return `Add(${cells(kind.value.cells)}, delta)`;
    case "set":
      return `Set(${cells(kind.value.cells)}, vector)`;
    default:
      return "...";
  }
}

function cells(some: AnyCells = []): string {
  const made = some.map((one) => {
    const senses = one.senses?.length ? `(${one.senses.join(", ")}${one.senses.length === 1 ? "," : ""}), ` : "";
    return `Cells(${word(one.word)}, ${senses}form="both")`;
  });
  return made.length === 1 ? made[0]! : `[${made.join(", ")}]`;
}

function word(one: AnyWord | undefined): string {
  return literal(one?.text?.trim() ?? "");
}
