/** How tokens are drawn: fields of the address, as the API takes them. */

import type { MessageInitShape } from "backpack-serving-client";
import type { SamplingSchema } from "backpack-serving-client/backpack_proto/v1/inference";
import { literal, quoted } from "../../parts/words";

export type SamplingInit = MessageInitShape<typeof SamplingSchema>;

/** Each field's name in addresses, commands (--NAME) and Python (NAME), and what people read. */
export const SAMPLING = [
  { name: "max_tokens", label: "Most tokens", step: "1", min: "1" },
  { name: "temperature", label: "Temperature", step: "any", min: "0" },
  { name: "top_p", label: "Top p", step: "any", min: "0" },
  { name: "top_k", label: "Top k", step: "1", min: "0" },
  { name: "min_p", label: "Min p", step: "any", min: "0" },
  { name: "repetition_penalty", label: "Repetition penalty", step: "any", min: "0" },
  { name: "seed", label: "Seed", step: "1", min: "0" },
] as const;
export type SamplingName = (typeof SAMPLING)[number]["name"];
export type SamplingFields = Partial<Record<SamplingName, string>>;

export function readSampling(fields: SamplingFields): SamplingInit {
  const number = (name: SamplingName) => (fields[name] ? Number(fields[name]) : undefined);
  const found = {
    maxTokens: number("max_tokens"),
    temperature: number("temperature"),
    topP: number("top_p"),
    topK: number("top_k"),
    minP: number("min_p"),
    repetitionPenalty: number("repetition_penalty"),
    seed: fields.seed ? BigInt(fields.seed) : undefined,
  };
  return Object.fromEntries(Object.entries(found).filter(([, value]) => value !== undefined));
}

const IN_GENERATE: readonly string[] = SAMPLING.map(({ name }) => name);

/** What `backpack try` takes of it. */
export const IN_TRY: readonly string[] = ["max_tokens", "temperature", "repetition_penalty", "seed"];

/** As options of `backpack generate`, or of a command that takes some. */
export function options(fields: SamplingFields, taken = IN_GENERATE): string {
  return named(fields)
    .filter(([name]) => taken.includes(name))
    .map(([name, value]) => ` --${name.replaceAll("_", "-")} ${quoted(value)}`)
    .join("");
}

/** As arguments of Python's `Sampling`. */
export function keywords(fields: SamplingFields): string {
  return named(fields)
    .map(([name, value]) => `${name}=${Number.isFinite(Number(value)) ? value.trim() : literal(value)}`)
    .join(", ");
}

function named(fields: SamplingFields): [string, string][] {
  return SAMPLING.flatMap(({ name }) => (fields[name] ? [[name, fields[name]!] as [string, string]] : []));
}
