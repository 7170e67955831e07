import { Outcome } from "../../parts/Outcome";
import { percent, visible } from "../../parts/words";
import { tokenPrompt } from "../../session/request";
import { session } from "../../session/session";
import type { Call } from "../../session/useCall";
import { useCall } from "../../session/useCall";
import type { ExplainResponse } from "backpack-serving-client/backpack_proto/v1/inference";
import { Terms } from "./Terms";
import { sameRelease, type Writing } from "./writing";

const LISTED = 12;

/** The exact terms of one token of a text. */
export function useTerms(writing: Writing | undefined, at: number | undefined): Call<ExplainResponse> {
  const asked = writing && at !== undefined && at > 0 && at < writing.tokens.length;
  return useCall(
    asked
      ? (signal) => {
          const ids = writing.tokens.map((token) => token.id);
          const prompt = tokenPrompt(ids.slice(0, at));
          const request = { prompt, target: { token: ids[at] }, limit: LISTED, ...sameRelease(writing) };
          return session.value!.backpack.inference.explain(request, { signal });
        }
      : null,
    [writing?.served.releaseDigest, asked ? at : undefined, asked ? writing.tokens[at]?.id : undefined],
  );
}

interface Props {
  writing: Writing;
  at: number;
  terms: Call<ExplainResponse>;
}

export function TokenDetails({ writing, at, terms }: Props) {
  const token = writing.tokens[at]!;
  if (at === 0) return <p class="quiet">Nothing stands before the first token, so nothing made it likely.</p>;
  return (
    <>
      <Outcome call={terms} of="its terms">
        {(explained) => (
          <div class="scroll" tabIndex={0} role="region" aria-label="Terms">
            <Terms explained={explained} />
          </div>
        )}
      </Outcome>
      {token.alternatives.length > 0 && (
        <p class="alternatives">
          Likeliest there:{" "}
          {token.alternatives.map((one) => (
            <span key={one.id} class={one.id === token.id ? "chosen" : ""}>
              <code>{visible(one.text)}</code> {percent(one.logProbability)}
            </span>
          ))}
        </p>
      )}
    </>
  );
}
