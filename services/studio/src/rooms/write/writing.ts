/** A text as it is written: the prompt's tokens, then those that stream in. */

import { FinishReason, type Served, type Token, type Usage } from "backpack-serving-client/backpack_proto/v1/inference";
import { draftEdits } from "../../draft/draft";
import type { EditInit } from "../../draft/line";
import { textPrompt, tokenPrompt, under } from "../../session/request";
import { session } from "../../session/session";
import type { SamplingInit } from "./sampling";

export interface Writing {
  prompt: number;
  tokens: Token[];
  served: Served;
  edits: EditInit[];
  finish: FinishReason;
  usage?: Usage;
}

const ALTERNATIVES = 5;

/** Write on from a prompt. `show` gets the text whenever there is more of it. */
export async function write(
  signal: AbortSignal,
  prompt: string,
  sampling: SamplingInit,
  show: (writing: Writing) => void,
): Promise<Writing> {
  const { inference } = session.value!.backpack;
  const edits = draftEdits();
  const drawn = { ...sampling, logProbabilities: ALTERNATIVES, promptLogProbabilities: ALTERNATIVES };
  const request = { prompt: textPrompt(prompt), sampling: drawn, ...under() };
  let writing: Writing | undefined;
  for await (const part of inference.generateStream(request, { signal })) {
    writing ??= {
      prompt: part.prompt.length,
      tokens: part.prompt,
      served: part.served!,
      edits,
      finish: part.finishReason,
    };
    writing = {
      ...writing,
      tokens: [...writing.tokens, ...part.tokens],
      finish: part.finishReason || writing.finish,
      ...(part.usage ? { usage: part.usage } : {}),
    };
    show(writing);
  }
  if (!writing) throw new Error("the server ended the stream before its first message");
  const scored = await rescored(signal, writing);
  show(scored);
  return scored;
}

/**
 * Read the whole text once more. What an engine in int8 draws from is rounded: there a token's log-probability may
 * differ from Score's and Explain's, and a figure should be the one that its terms add up to.
 */
async function rescored(signal: AbortSignal, writing: Writing): Promise<Writing> {
  const text = tokenPrompt(writing.tokens.map((token) => token.id));
  const request = { text, alternatives: ALTERNATIVES, ...sameRelease(writing) };
  const { tokens } = await session.value!.backpack.inference.score(request, { signal });
  return { ...writing, tokens: writing.tokens.map(({ text }, at) => ({ ...tokens[at]!, text })) };
}

/** The same release and draft that a text was written under, wherever its channel points by now. */
export function sameRelease({ served, edits }: Writing) {
  return { release: served.release, ...(edits.length ? { draft: { edits } } : {}) };
}
