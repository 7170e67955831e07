import type { JudgeResponse } from "backpack-serving-client/backpack_proto/v1/inference";
import { counted, visible } from "./words";

const WORSE = 0.05;
/* Shown as a warning. A server refuses from BACKPACK_DEGRADATION on, which is as much unless it is set. */

const WORTH_SHOWING = 5e-4;

/** What a release, with a draft or without, does to ordinary text, which it should leave alone. */
export function JudgementView({ judgement }: { judgement: JudgeResponse }) {
  const { tokens, perplexityBefore: before, perplexityAfter: after, moved, cells, topics, biased } = judgement;
  const change = after / before - 1;
  const parts = [
    cells ? counted(cells, "cell") : "",
    topics ? counted(topics, "topic") : "",
    biased ? counted(biased, "biased token") : "",
  ].filter(Boolean);
  const shown = moved.filter((word) => Math.abs(word.after - word.before) >= WORTH_SHOWING);
  return (
    <div class="judgement">
      <p>
        {parts.join(", ") || "No edit"}. Perplexity of {tokens.toLocaleString("en")} tokens of ordinary text:{" "}
        {before.toFixed(2)} → {after.toFixed(2)}{" "}
        <strong class={change > WORSE ? "warning" : "fine"}>({signedPercent(change)})</strong>
        {change > WORSE && <span class="warning"> Channels may refuse it.</span>}
      </p>
      {shown.length === 0 ? (
        <p class="quiet">No word's probability changes by 0.05 %.</p>
      ) : (
        <ul class="chips" aria-label="Words whose probability moves most">
          {shown.map((word) => (
            <li key={word.token!.id}>
              <span class="chip">{visible(word.token!.text)}</span>{" "}
              <span class="score">{signedPercent(word.after - word.before, 2)}</span>
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}

function signedPercent(share: number, digits = 1): string {
  const text = Math.abs(100 * share).toFixed(digits);
  return `${share < 0 && Number(text) !== 0 ? "−" : "+"}${text} %`;
}
