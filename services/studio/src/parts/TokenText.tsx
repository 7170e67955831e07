import type { ComponentChildren } from "preact";
import { arrows } from "./arrows";
import { visible } from "./words";

export interface ShownToken {
  text: string;
  /** A class of tint.ts. */
  tint: string;
  /** Said after the token's text, such as "12.00 %". */
  figure: string;
}

interface Props {
  label: string;
  tokens: ShownToken[];
  /** How many of them are the prompt's. */
  prompt?: number;
  selected?: number;
  /** Tokens that count for the selected one, and how much, from −1 to 1. */
  marked?: ReadonlyMap<number, number>;
  onSelect?: (at: number) => void;
}

/** A text, token by token. Arrow keys move among the tokens, Enter selects one. */
export function TokenText({ label, tokens, prompt = 0, selected, marked, onSelect }: Props) {
  const reachable = selected ?? Math.min(prompt, tokens.length - 1);

  return (
    <div class="token-text" role="group" aria-label={`${label}; arrow keys move`} onKeyDown={arrows}>
      {tokens.map((token, at) => {
        const mark = marked?.get(at);
        const classes = [
          "token",
          token.tint,
          at === prompt && at ? "begins" : "",
          mark === undefined ? "" : markClass(mark),
        ];
        return (
          <>
            <button
              key={at}
              type="button"
              class={classes.join(" ")}
              tabIndex={at === reachable ? 0 : -1}
              aria-pressed={onSelect && at === selected}
              aria-label={`${visible(token.text)} ${token.figure}`}
              title={token.figure}
              onClick={() => onSelect?.(at)}
            >
              {shown(token.text)}
            </button>
            {token.text.includes("\n") && <br />}
          </>
        );
      })}
    </div>
  );
}

function markClass(mark: number): string {
  return `mark ${mark < 0 ? "mark-down" : "mark-up"} ${Math.abs(mark) > 0.5 ? "mark-strong" : ""}`;
}

function shown(text: string): ComponentChildren {
  if (/^<\|.*\|>$/.test(text)) return <span class="special">{text === "<|endoftext|>" ? "▸" : text}</span>;
  return text.replaceAll("\n", "↵");
}
