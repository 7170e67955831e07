/** A map of one sense of many words: fields of the address, as the API takes them. */

import { WordForm } from "backpack-serving-client/backpack_proto/v1/edits";
import { under } from "../../session/request";
import { session } from "../../session/session";
import { listed } from "./search";

export interface Mapping {
  sense: string;
  words: string;
  toward: string;
  against: string;
}

const NAMED = 6;

/** Each word once, as it stands within a text. */
export function map(signal: AbortSignal, { sense, words, toward, against }: Mapping) {
  return session.value!.backpack.inference.mapSense(
    {
      sense: Number(sense),
      words: named(words),
      toward: named(toward),
      against: toward.trim() ? named(against) : [],
      limit: NAMED,
      ...under(),
    },
    { signal },
  );
}

function named(words: string) {
  return [...new Set(listed(words))].map((text) => ({ text, form: WordForm.INNER }));
}
