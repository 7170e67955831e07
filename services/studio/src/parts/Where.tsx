import type { Channel } from "backpack-serving-client/backpack_proto/v1/interventions";
import { link, note, on } from "../address";
import { draft, setDraft } from "../draft/draft";
import { session, since } from "../session/session";
import { useCall } from "../session/useCall";
import { Field } from "./Field";
import { Input } from "./Input";
import { id, counted } from "./words";

const SHOWN = 100;

/** Which release a room looks at, and the draft over it. */
export function Where() {
  const mayList = session.value?.mayAuthor ?? false;
  return (
    <div class="where">
      <Field label="Release">
        {mayList ? <Listed /> : <Input value={on.value} onValue={(to) => note({ on: to })} />}
      </Field>
      {draft.value.length > 0 && (
        <p class="drafted">
          with <a href={link("edit")}>a draft of {counted(draft.value.length, "edit")}</a>{" "}
          <button type="button" onClick={() => setDraft([])}>
            Drop it
          </button>
        </p>
      )}
    </div>
  );
}

function Listed(props: { id?: string }) {
  const { releases } = session.value!.backpack;
  const call = useCall(
    async (signal) => {
      const [channels, made] = await Promise.all([
        releases.listChannels({}, { signal }),
        releases.listReleases({ pageSize: SHOWN }, { signal }),
      ]);
      return { channels: channels.channels, releases: made.releases };
    },
    [since.value],
  );
  const found = call.state === "done" ? call.value : { channels: [], releases: [] };
  const names = found.channels.flatMap((channel) => [id(channel.name), ...(channel.canary ? [canaryOf(channel)] : [])]);
  const numbers = found.releases.map((release) => String(release.number)).filter((number) => number !== "0");
  const unknown = !names.includes(on.value) && !numbers.includes(on.value) && on.value !== "0";
  return (
    <select {...props} value={on.value} onChange={(event) => note({ on: event.currentTarget.value })}>
      {unknown && <option>{on.value}</option>}
      {found.channels.map((channel) => (
        <option key={channel.name} value={id(channel.name)}>
          {id(channel.name)}, at release {String(channel.release)}
        </option>
      ))}
      {found.channels.map(
        (channel) =>
          channel.canary && (
            <option key={channel.name} value={canaryOf(channel)}>
              {canaryOf(channel)}, release {String(channel.canary.release)}
            </option>
          ),
      )}
      {numbers.map((number) => (
        <option key={number} value={number}>
          release {number}
        </option>
      ))}
      <option value="0">release 0, the model unpatched</option>
    </select>
  );
}

/** The canary of a channel alone, as requests name it. */
function canaryOf(channel: Channel): string {
  return `${id(channel.name)}:canary`;
}
