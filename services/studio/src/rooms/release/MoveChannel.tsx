import type { Channel, Release } from "backpack-serving-client/backpack_proto/v1/interventions";
import { useState } from "preact/hooks";
import { link } from "../../address";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Input } from "../../parts/Input";
import { JudgementView } from "../../parts/JudgementView";
import { Outcome } from "../../parts/Outcome";
import { id, revisionId } from "../../parts/words";
import { session, since } from "../../session/session";
import { useCall } from "../../session/useCall";
import type { Move } from "./moves";

interface Props {
  channel: Channel;
  releases: Release[];
  asked: string;
  busy: boolean;
  onMove: (to: Move) => void;
}

const MOVED = 6;

/** Another release for a channel, or for a share of its requests; judged before it is one. */
export function MoveChannel({ channel, releases, asked, busy, onMove }: Props) {
  const [chosen, setChosen] = useState(asked);
  const [permille, setPermille] = useState("50");
  const { mayCall, backpack } = session.value!;
  const judged = useCall(
    chosen && chosen !== "0" && mayCall
      ? (signal) =>
          backpack.inference.judge(
            { release: BigInt(chosen), limit: MOVED, ...(since.value ? { minRevision: since.value } : {}) },
            { signal },
          )
      : null,
    [chosen],
  );
  const name = id(channel.name);

  /** What Enter does, too: the share is the one field that is typed into. */
  function startCanary(): void {
    if (chosen && chosen !== String(channel.release) && !busy) {
      onMove({ kind: "start", release: BigInt(chosen), permille: Number(permille) });
    }
  }

  return (
    <Form label={`Move ${name}`} onSubmit={startCanary}>
      <Field label={`Another release for ${name}`}>
        <select value={chosen} onChange={(event) => setChosen(event.currentTarget.value)}>
          <option value="">choose one</option>
          {releases.map((release) => (
            <option key={release.name} value={String(release.number)}>
              {String(release.number)}: {release.revisions.map(revisionId).join(" ") || "the model unpatched"}
            </option>
          ))}
          {!releases.some((release) => release.number === 0n) && <option value="0">0: the model unpatched</option>}
        </select>
      </Field>
      {chosen && (
        <>
          <p>
            <a href={link("release", { view: "releases", release: chosen, against: String(channel.release) })}>
              What is in it, and how it differs from release {String(channel.release)}
            </a>
          </p>
          <Outcome
            call={judged}
            of="its judgement"
            idle={chosen === "0" ? "The model unpatched needs no judgement." : ""}
          >
            {(judgement) => <JudgementView judgement={judgement} />}
          </Outcome>
          {chosen === String(channel.release) ? (
            <p class="quiet">
              {name} is at release {chosen} already.
            </p>
          ) : (
            <div class="buttons">
              <button
                type="button"
                class="primary"
                disabled={busy}
                onClick={() => onMove({ kind: "activate", release: BigInt(chosen) })}
              >
                Activate for all
              </button>
              <span class="canary">
                <button disabled={busy}>{channel.canary ? "Change the canary" : "Start a canary"}</button>
                <Field label="in a thousand requests">
                  <Input type="number" min="1" max="999" value={permille} onValue={setPermille} />
                </Field>
              </span>
            </div>
          )}
        </>
      )}
    </Form>
  );
}
