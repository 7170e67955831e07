import { Code, type Refusal } from "backpack-serving-client";
import { signOut } from "../session/session";

const MEANS: Partial<Record<Code, string>> = {
  [Code.Unauthenticated]: "The server doesn't know this key any more.",
  [Code.PermissionDenied]: "This key may not do that.",
  [Code.Unavailable]: "The server can't answer now.",
  [Code.ResourceExhausted]: "Too much was asked at once.",
  [Code.Aborted]: "Somebody else changed it meanwhile.",
  [Code.DeadlineExceeded]: "It took too long.",
};

/** What browsers say when nobody answers; each has its own words. */
const UNREACHED = /failed to fetch|networkerror|load failed/i;

/** Why a call was refused, in the server's words, and what one can do. */
export function Refused({ refusal }: { refusal: Refusal }) {
  const { code, reason, message, retryAfter } = refusal;
  const means = UNREACHED.test(message) ? "The server can't be reached." : MEANS[code];
  return (
    <div class="refused" role="alert">
      {means && <strong>{means} </strong>}
      <span>{message}</span>
      {retryAfter !== undefined && <span> Try again in {Math.ceil(retryAfter)} s.</span>}
      {reason && <code>{reason}</code>}
      {code === Code.Unauthenticated && (
        <button type="button" onClick={signOut}>
          Sign in again
        </button>
      )}
    </div>
  );
}
