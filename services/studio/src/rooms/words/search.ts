/** A search for senses: fields of the address, as the API takes them. */

import {
  SenseEffect,
  SenseOrder,
  type FoundSense,
  type Served,
} from "backpack-serving-client/backpack_proto/v1/inference";
import { textPrompt, under } from "../../session/request";
import { session } from "../../session/session";

export interface Search {
  words: string;
  against: string;
  effect: string;
  order: string;
  /** One on each line. */
  prompts: string;
}

export interface Found {
  senses: FoundSense[];
  served: Served;
  /** Of the page that follows; empty after the last. */
  next: string;
}

export const EFFECTS = { raise: SenseEffect.RAISE, lower: SenseEffect.LOWER, both: SenseEffect.BOTH };
export const ORDERS = { score: SenseOrder.SCORE, use: SenseOrder.USE };

const PAGE = 25;

/** A page of it, after the one that `before` ended with. */
export async function find(signal: AbortSignal, search: Search, before?: Found): Promise<Found> {
  const against = listed(search.against);
  const answer = await session.value!.backpack.inference.findSenses(
    {
      words: listed(search.words).map((text) => ({ text })),
      against: against.map((text) => ({ text })),
      againstAll: against.length === 0, // what raises every word alike makes none likelier
      effect: EFFECTS[search.effect as keyof typeof EFFECTS],
      order: ORDERS[search.order as keyof typeof ORDERS],
      prompts: prompts(search).map(textPrompt),
      pageSize: PAGE,
      pageToken: before?.next ?? "",
      requestKey: "studio", // all pages under the same half of a canary
      ...under(),
    },
    { signal },
  );
  return {
    senses: [...(before?.senses ?? []), ...answer.senses],
    served: answer.served!,
    next: answer.nextPageToken,
  };
}

export function listed(words: string): string[] {
  return words.split(/[\s,]+/).filter(Boolean);
}

export function prompts(search: Search): string[] {
  return search.prompts.split("\n").filter((line) => line.trim());
}
