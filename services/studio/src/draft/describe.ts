/** An edit as people read it, in the words of the lines that commands take. */

import type { Cells, Edit, Vector, Word } from "backpack-serving-client/backpack_proto/v1/edits";
import { visible } from "../parts/words";

export function describe({ kind }: Edit): string {
  switch (kind.case) {
    case "scale":
      return `scale ${cells(kind.value.cells)} ${kind.value.factor}`;
    case "add":
      return `add ${cells(kind.value.cells)} ${vector(kind.value.delta)}`;
    case "set":
      return `set ${cells(kind.value.cells)} ${vector(kind.value.vector)}`;
    case "copy": {
      const { source, sourceSense } = kind.value;
      return `copy ${cells(kind.value.cells)} ${word(source)}${sourceSense === undefined ? "" : `:${sourceSense}`}`;
    }
    case "projectOut":
      return `project-out ${cells(kind.value.cells)} ${word(kind.value.direction)}`;
    case "swap":
      return `swap ${cells(kind.value.cells)} ${word(kind.value.old)} ${word(kind.value.new)}`;
    case "topic":
      return `topic ${words(kind.value.words)} ${kind.value.strength}${kind.value.constant ? ", constant" : ""}`;
    case "bias":
      return kind.value.amount === -Infinity
        ? `forbid ${words(kind.value.words)}`
        : `bias ${words(kind.value.words)} ${kind.value.amount}`;
    default:
      return "an edit of a kind that this studio doesn't know";
  }
}

const SHOWN = 12;

function cells(of: Cells[]): string {
  const shown = of
    .slice(0, SHOWN)
    .map((one) => `${word(one.word)}${one.senses.length ? `:${ranges(one.senses)}` : ""}`);
  return shown.join(",") + (of.length > SHOWN ? ` and ${of.length - SHOWN} more` : "");
}

function words(of: Word[]): string {
  return of.slice(0, SHOWN).map(word).join(",") + (of.length > SHOWN ? ` and ${of.length - SHOWN} more` : "");
}

function word(one: Word | undefined): string {
  return one?.text ? visible(one.text) : `token ${one?.token}`;
}

function vector(one: Vector | undefined): string {
  return `(a vector of ${one?.shape.at(-1) ?? 0})`;
}

/** 8,12-14 of 8, 12, 13 and 14. */
function ranges(numbers: number[]): string {
  const runs: [number, number][] = [];
  for (const number of numbers) {
    const last = runs.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([from, to]) => (from === to ? `${from}` : `${from}-${to}`)).join(",");
}
