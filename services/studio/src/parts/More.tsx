import type { Call } from "../session/useCall";
import { Refused } from "./Refused";

interface Props<T> {
  shown: Call<T>;
  more: { call: Call<unknown>; start(before: NoInfer<T>): Promise<unknown> };
}

/** The button for the next page of a list, while there is one; and why it can't be had. */
export function More<T extends { next: string }>({ shown, more }: Props<T>) {
  return (
    <>
      {shown.state === "done" && shown.value.next && (
        <div class="buttons">
          <button type="button" disabled={more.call.state === "running"} onClick={() => void more.start(shown.value)}>
            Show more
          </button>
        </div>
      )}
      {more.call.state === "refused" && <Refused refusal={more.call.refusal} />}
    </>
  );
}
