/** A draft tried: texts and next words without it and with it, and what it does to ordinary text. */

import { CompareMode, type NextToken } from "backpack-serving-client/backpack_proto/v1/inference";
import { on } from "../../address";
import { choice, textPrompt, under } from "../../session/request";
import { session, since } from "../../session/session";
import type { SamplingInit } from "../write/sampling";

export interface Trial {
  prompt: string;
  /** Without the edits, and with them. */
  sides: [Side, Side];
}

export interface Side {
  text: string;
  next: NextToken;
}

const TOP = 6;

/** Both sides are drawn with the same seed. */
export async function tryDraft(
  signal: AbortSignal,
  prompts: string[],
  words: string[],
  sampling: SamplingInit,
): Promise<Trial[]> {
  return Promise.all(prompts.map((prompt) => tryPrompt(signal, prompt, words, sampling)));
}

async function tryPrompt(signal: AbortSignal, prompt: string, words: string[], sampling: SamplingInit): Promise<Trial> {
  const { inference } = session.value!.backpack;
  const asked = textPrompt(prompt);
  const write = (drafted: boolean) =>
    inference.generate({ prompt: asked, sampling, requestKey: "studio", ...under(on.value, drafted) }, { signal });
  const [plain, drafted, compared] = await Promise.all([
    write(false),
    write(true),
    inference.compare(
      {
        prompt: asked,
        mode: CompareMode.NEXT_TOKEN,
        releases: [choice(on.value, false), choice(on.value, true)],
        targets: words.map((text) => ({ text })),
        top: TOP,
        requestKey: "studio", // the same half of a canary for both sides
        ...(since.value ? { minRevision: since.value } : {}),
      },
      { signal },
    ),
  ]);
  const [before, after] = compared.releases.map((one) => one.result.value as NextToken);
  return {
    prompt,
    sides: [
      { text: plain.text, next: before! },
      { text: drafted.text, next: after! },
    ],
  };
}
