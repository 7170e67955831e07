/** Calls as a component sees them: not made yet, running, refused, or done. */

import { refusal, type Refusal } from "backpack-serving-client";
import { useCallback, useEffect, useRef, useState } from "preact/hooks";

export type Call<T> =
  { state: "idle" } | { state: "running" } | { state: "refused"; refusal: Refusal } | { state: "done"; value: T };

export interface Action<A extends unknown[], T> {
  call: Call<T>;
  /** Ends a call that still runs, then makes this one. The value, or undefined where there is none. */
  start(...given: A): Promise<T | undefined>;
  stop(): void;
}

/** A call that is made when somebody says so. It ends with the component. */
export function useAction<A extends unknown[], T>(run: (signal: AbortSignal, ...given: A) => Promise<T>): Action<A, T> {
  const [call, setCall] = useState<Call<T>>({ state: "idle" });
  const latest = useRef(run);
  latest.current = run;
  const running = useRef<AbortController | null>(null);
  const stop = useCallback(() => {
    running.current?.abort();
    running.current = null;
    setCall((now) => (now.state === "running" ? { state: "idle" } : now));
  }, []);
  const start = useCallback(async (...given: A) => {
    running.current?.abort();
    const mine = (running.current = new AbortController());
    setCall({ state: "running" });
    try {
      const value = await latest.current(mine.signal, ...given);
      if (running.current === mine) setCall({ state: "done", value });
      return mine.signal.aborted ? undefined : value;
    } catch (error) {
      if (running.current === mine) setCall({ state: "refused", refusal: refusal(error) });
      return undefined;
    }
  }, []);
  useEffect(() => () => running.current?.abort(), []);
  return { call, start, stop };
}

/** A call that is made at once, and again when one of `given` changes. With null in place of it none is made. */
export function useCall<T>(run: ((signal: AbortSignal) => Promise<T>) | null, given: readonly unknown[]): Call<T> {
  const { call, start, stop } = useAction((signal) => (run ? run(signal) : Promise.reject(new Error("no call"))));
  useEffect(() => {
    if (run) void start();
    else stop();
  }, given);
  return run ? call : { state: "idle" };
}
