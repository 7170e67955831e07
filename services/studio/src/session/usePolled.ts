import { refusal } from "backpack-serving-client";
import { useEffect, useState } from "preact/hooks";
import type { Call } from "./useCall";

/**
 * A call that is made again and again, and at once when one of `given` changes. The last value stands until there is
 * another one, so that nothing that one types into goes away. A hidden page asks nothing.
 */
export function usePolled<T>(
  run: (signal: AbortSignal) => Promise<T>,
  seconds: number,
  given: readonly unknown[],
): Call<T> {
  const [call, setCall] = useState<Call<T>>({ state: "running" });
  useEffect(() => {
    const ended = new AbortController();
    let timer = 0;
    async function ask(): Promise<void> {
      if (!document.hidden) {
        try {
          const value = await run(ended.signal);
          if (!ended.signal.aborted) setCall({ state: "done", value });
        } catch (error) {
          if (!ended.signal.aborted) setCall({ state: "refused", refusal: refusal(error) });
        }
      }
      if (!ended.signal.aborted) timer = window.setTimeout(ask, seconds * 1000);
    }
    void ask();
    return () => {
      ended.abort();
      clearTimeout(timer);
    };
  }, given);
  return call;
}
