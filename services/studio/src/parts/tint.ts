/** Colours of tokens, by class. Every step has its words in a legend, and each token says its figure. */

export interface Step {
  class: string;
  label: string;
}

/** From a likely token, which has no colour, to one that surprises. */
export const PROBABILITY: Step[] = [
  { class: "p0", label: "over 50 %" },
  { class: "p1", label: "20 – 50 %" },
  { class: "p2", label: "5 – 20 %" },
  { class: "p3", label: "1 – 5 %" },
  { class: "p4", label: "0.1 – 1 %" },
  { class: "p5", label: "below 0.1 %" },
];

export function probabilityTint(logProbability: number | undefined): string {
  if (logProbability === undefined) return "";
  const at = [0.5, 0.2, 0.05, 0.01, 0.001].findIndex((bound) => Math.exp(logProbability) >= bound);
  return PROBABILITY.at(at)!.class;
}

/** By how much a token's probability was changed: a factor, in doublings. */
export const CHANGE: Step[] = [
  { class: "less2", label: "a quarter or less" },
  { class: "less1", label: "⅘ or less" },
  { class: "same", label: "about as likely" },
  { class: "more1", label: "1¼ × or more" },
  { class: "more2", label: "4 × or more" },
];

export function changeTint(logRatio: number | undefined): string {
  if (logRatio === undefined) return "";
  const at = [Math.log(0.25), Math.log(0.8), Math.log(1.25), Math.log(4)].findIndex((bound) => logRatio <= bound);
  return CHANGE.at(at)!.class;
}

/** A factor, of a difference of log-probabilities. */
export function factor(logRatio: number | undefined): string {
  if (logRatio === undefined) return "";
  const ratio = Math.exp(logRatio);
  if (!Number.isFinite(ratio) || ratio >= 1000) return "over 1000 × as likely";
  return ratio < 0.001 ? "under 0.001 × as likely" : `${Number(ratio.toPrecision(2))} × as likely`;
}
