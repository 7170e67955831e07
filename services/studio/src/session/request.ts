/** Fields that most calls of inference share: under which release, with which draft, since which write. */

import { on } from "../address";
import { draftEdits } from "../draft/draft";
import { since } from "./session";

/** The release that rooms look at, or the one that `where` names by channel or number; with the draft over it. */
export function under(where: string = on.value, drafted = true) {
  const edits = drafted ? draftEdits() : [];
  return {
    ...(isNumber(where) ? { release: BigInt(where) } : { channel: where }),
    ...(edits.length ? { draft: { edits } } : {}),
    ...(since.value ? { minRevision: since.value } : {}),
  };
}

/** The same, as Compare takes it. */
export function choice(where: string, drafted: boolean) {
  const edits = drafted ? draftEdits() : [];
  return {
    release: isNumber(where)
      ? ({ case: "number", value: BigInt(where) } as const)
      : ({ case: "channel", value: where } as const),
    ...(edits.length ? { draft: { edits } } : {}),
  };
}

export function isNumber(where: string): boolean {
  return /^\d{1,18}$/.test(where);
}

export function textPrompt(value: string) {
  return { form: { case: "text", value } } as const;
}

export function tokenPrompt(ids: number[]) {
  return { form: { case: "tokens", value: { ids } } } as const;
}
