import type { ScoredToken } from "backpack-serving-client/backpack_proto/v1/inference";
import { link } from "../address";
import { arrows } from "./arrows";
import { signed, visible } from "./words";

/** Tokens with their scores; each leads to its own senses. */
export function TokenList({ label, tokens, digits = 1 }: { label: string; tokens: ScoredToken[]; digits?: number }) {
  return (
    <ul class="chips" aria-label={`${label}; arrow keys move`} onKeyDown={arrows}>
      {tokens.map(({ token, score }, at) => (
        <li key={token!.id}>
          <a class="chip" tabIndex={at ? -1 : 0} href={link("words", { word: token!.text, token: String(token!.id) })}>
            {visible(token!.text)}
          </a>{" "}
          <span class="score">{signed(score, digits)}</span>
        </li>
      ))}
    </ul>
  );
}
