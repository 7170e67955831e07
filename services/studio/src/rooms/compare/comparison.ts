/** A text under several releases: what comes next, how likely it is, how it goes on. */

import {
  CompareMode,
  type NextToken,
  type Served,
  type TextScore,
  type Token,
} from "backpack-serving-client/backpack_proto/v1/inference";
import { on } from "../../address";
import { choice, textPrompt, under } from "../../session/request";
import { session, since } from "../../session/session";

export const MOST = 8;

/** In place of a channel or a number: the draft, over the release that rooms look at. */
export const DRAFT = "draft";

export interface Column {
  name: string;
  served: Served;
  next: NextToken;
  score: TextScore;
  text: string;
}

export interface Comparison {
  prompt: string;
  tokens: Token[];
  columns: Column[];
}

const TOP = 8;

/** Texts are greedy, so that only the releases differ. */
export async function compare(
  signal: AbortSignal,
  prompt: string,
  releases: string[],
  words: string[],
  maxTokens: number,
): Promise<Comparison> {
  const { inference } = session.value!.backpack;
  const shared = {
    prompt: textPrompt(prompt),
    releases: releases.map((name) => (name === DRAFT ? choice(on.value, true) : choice(name, false))),
    requestKey: "studio", // the same half of a canary for all that is asked
    ...(since.value ? { minRevision: since.value } : {}),
  };
  const targets = words.map((text) => ({ text }));
  const write = async (name: string) => {
    if (!maxTokens) return "";
    const where = name === DRAFT ? under() : under(name, false);
    const request = { prompt: shared.prompt, sampling: { maxTokens, temperature: 0 }, requestKey: "studio", ...where };
    return (await inference.generate(request, { signal })).text;
  };
  const [next, scored, texts] = await Promise.all([
    inference.compare({ ...shared, mode: CompareMode.NEXT_TOKEN, top: TOP, targets }, { signal }),
    inference.compare({ ...shared, mode: CompareMode.SCORE }, { signal }),
    Promise.all(releases.map(write)),
  ]);
  return {
    prompt,
    tokens: scored.tokens,
    columns: releases.map((name, at) => ({
      name,
      served: next.releases[at]!.served!,
      next: next.releases[at]!.result.value as NextToken,
      score: scored.releases[at]!.result.value as TextScore,
      text: texts[at]!,
    })),
  };
}

/** How a release of a comparison is called. */
export function title(name: string): string {
  if (name === DRAFT) return `${on.value} with the draft`;
  if (name === "0") return "unpatched";
  return /^\d+$/.test(name) ? `release ${name}` : name;
}
