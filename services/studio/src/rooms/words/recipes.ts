/** How to ask for senses without the studio. */

import { commandWhere, pythonWhere, withClient } from "../../parts/asking";
import { literal, quoted } from "../../parts/words";
import type { Mapping } from "./mapping";
import { listed, prompts, type Search } from "./search";

export function sensesRecipe(word: string) {
  const named = word || "ship";
  return {
    shell: [`backpack senses ${quoted(named)} --neighbours 5${commandWhere()}`],
    python: withClient(
      "Client",
      `for sense in client.senses(${literal(named)}, neighbours=5${pythonWhere()}).senses:`,
      "    print(sense.number, sense.raises[:3], sense.lowers[:3])",
    ),
  };
}

export function findRecipe(search: Search) {
  const words = listed(search.words || "ship");
  const against = listed(search.against);
  const shown = prompts(search);
  const shell = [
    `backpack find ${words.map(quoted).join(" ")}`,
    ...against.map((word) => `--against ${quoted(word)}`),
    ...(search.effect === "lower" ? ["--lowers"] : []),
    ...(search.order === "use" ? ["--by use"] : []),
    ...shown.map((prompt) => `--prompt ${quoted(prompt)}`),
  ];
  const python = [
    literals(words),
    ...(against.length ? [literals(against)] : []),
    ...(search.effect === "raise" ? [] : [`effect=${literal(search.effect)}`]),
    ...(search.order === "score" ? [] : [`order=${literal(search.order)}`]),
    ...(shown.length ? [`prompts=${literals(shown)}`] : []),
  ];
  return {
    shell: [shell.join(" ") + commandWhere()],
    python: withClient(
      "Client",
      `for found in client.find_senses(${python.join(", ")}${pythonWhere()}).senses:`,
      "    print(found.token.text, found.sense, found.score)",
    ),
  };
}

/** One text, or a list of them. */
function literals(words: string[]): string {
  return words.length === 1 ? literal(words[0]!) : `[${words.map(literal).join(", ")}]`;
}

export function mapRecipe({ sense, words, toward, against }: Mapping) {
  const [many, right, left] = [words || "ship sea horse", toward, toward && against].map(listed);
  const shell = [
    `backpack map ${quoted(sense || "0")} ${many!.map(quoted).join(" ")}`,
    ...right!.map((word) => `--toward ${quoted(word)}`),
    ...left!.map((word) => `--against ${quoted(word)}`),
  ];
  const python = [
    /^\d+$/.test(sense) ? sense : "0",
    `[${many!.map(literal).join(", ")}]`,
    ...(right!.length ? [`toward=${literals(right!)}`] : []),
    ...(left!.length ? [`against=${literals(left!)}`] : []),
  ];
  return {
    shell: [shell.join(" ") + commandWhere()],
    python: withClient(
      "Client",
      `for word in client.map_sense(${python.join(", ")}${pythonWhere()}).words:`,
      "    print(word.token.text, word.x, word.y)",
    ),
  };
}

export function usesRecipe(word: string) {
  const named = word || "ship";
  return {
    shell: [`backpack uses ${quoted(named)}${commandWhere()}`],
    python: withClient(
      "Client",
      `for use in client.uses(${literal(named)}${pythonWhere()}).uses:`,
      "    print(use.senses[0].contribution)",
    ),
  };
}
