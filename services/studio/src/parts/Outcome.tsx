import type { ComponentChildren } from "preact";
import type { Call } from "../session/useCall";
import { Refused } from "./Refused";

interface Props<T> {
  call: Call<T>;
  /** What is said before anything was asked. */
  idle?: ComponentChildren;
  /** What is being waited for, such as "the senses". */
  of: string;
  children: (value: T) => ComponentChildren;
}

/** What a call came to: nothing yet, waiting, a refusal, or its value. */
export function Outcome<T>({ call, idle, of, children }: Props<T>) {
  switch (call.state) {
    case "idle":
      return idle ? <p class="quiet">{idle}</p> : null;
    case "running":
      return (
        <p class="quiet waiting" role="status">
          Waiting for {of} …
        </p>
      );
    case "refused":
      return <Refused refusal={call.refusal} />;
    case "done":
      return <>{children(call.value)}</>;
  }
}
