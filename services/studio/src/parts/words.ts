/** Figures and names as people read them. */

import type { Timestamp } from "backpack-serving-client";

export function percent(logProbability: number | undefined): string {
  if (logProbability === undefined) return "–";
  const p = 100 * Math.exp(logProbability);
  return p > 0 && p < 0.005 ? "< 0.01 %" : `${p.toFixed(2)} %`;
}

export function signed(value: number, digits = 2): string {
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  const text = Math.abs(value).toFixed(digits);
  return `${value < 0 && Number(text) !== 0 ? "−" : "+"}${text}`;
}

/** The last part of a resource's name. */
export function id(name: string): string {
  return name.slice(name.lastIndexOf("/") + 1);
}

/** PATCH:NUMBER of a revision's name, as commands take it. */
export function revisionId(name: string): string {
  const [, , , patch, , number] = name.split("/");
  return `${patch}:${number}`;
}

export function time(at: Timestamp | undefined): string {
  if (!at) return "";
  return new Date(Number(at.seconds) * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

export function counted(number: number | bigint, noun: string, plural = `${noun}s`): string {
  return `${number} ${Number(number) === 1 ? noun : plural}`;
}

/** A token as one reads it in a list: spaces and line ends are seen. */
export function visible(text: string): string {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

/** A word in single quotes, as shells take it. */
export function quoted(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`;
}

/** A text as a literal of Python. */
export function literal(text: string): string {
  return JSON.stringify(text);
}
