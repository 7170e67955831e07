import type { Token } from "backpack-serving-client/backpack_proto/v1/inference";
import { link } from "../address";
import { visible } from "./words";

/** From a term, or an answer of a search, to what the sense speaks for. */
export function SenseLink({ token, sense }: { token: Token; sense: number }) {
  const fields = { word: token.text, token: String(token.id), sense: String(sense) };
  return (
    <a href={link("words", fields)} aria-label={`sense ${sense} of ${visible(token.text)}`}>
      sense {sense}
    </a>
  );
}
