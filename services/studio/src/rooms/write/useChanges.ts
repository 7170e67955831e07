import { CompareMode } from "backpack-serving-client/backpack_proto/v1/inference";
import { tokenPrompt } from "../../session/request";
import { session } from "../../session/session";
import { useCall, type Call } from "../../session/useCall";
import type { Writing } from "./writing";

/** Whether a text was steered at all. */
export function isSteered({ served, edits }: Writing): boolean {
  return served.release !== 0n || edits.length > 0;
}

/**
 * By how much each token's log-probability was changed: by the draft, if there was one, else by the release. One read of
 * the text answers for both.
 */
export function useChanges(writing: Writing | undefined, wanted: boolean): Call<(number | undefined)[]> {
  const ask = writing && wanted && isSteered(writing) && writing.usage;
  return useCall(
    ask
      ? async (signal) => {
          const { served, edits, tokens } = writing;
          const before = edits.length ? served.release : 0n;
          const number = (value: bigint) => ({ release: { case: "number", value } as const });
          const answer = await session.value!.backpack.inference.compare(
            {
              prompt: tokenPrompt(tokens.map((token) => token.id)),
              mode: CompareMode.SCORE,
              releases: [number(before), { ...number(served.release), ...(edits.length ? { draft: { edits } } : {}) }],
            },
            { signal },
          );
          const [plain, steered] = answer.releases.map((one) =>
            one.result.case === "score" ? one.result.value.logProbabilities : [],
          );
          return [undefined, ...steered!.map((value, at) => value - plain![at]!)];
        }
      : null,
    [ask, writing?.served.releaseDigest, writing?.tokens.length],
  );
}
