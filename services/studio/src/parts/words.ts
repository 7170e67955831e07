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

/** The channel that requests mean: NAME:canary is the canary of NAME alone. */
export function channelOf(name: string): string {
  return name.replace(/:canary$/, "");
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

/** A control character that a terminal could obey when it is pasted, even within quotes. */
const CONTROL = /[\0-\x08\x0b-\x1f\x7f-\x9f]/g;

/** A word as shells take it: in single quotes if need be, and with escapes for control characters. */
export function quoted(word: string): string {
  if (/^[\w@%+=:,./-]+$/.test(word)) return word;
  if (word.search(CONTROL) < 0) return `'${word.replaceAll("'", `'\\''`)}'`;
  const escaped = word.replace(/[\\']/g, "\\$&");
  return `$'${escaped.replace(CONTROL, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`)}'`;
}

/** A text as a literal of Python. */
export function literal(text: string): string {
  return JSON.stringify(text);
}
