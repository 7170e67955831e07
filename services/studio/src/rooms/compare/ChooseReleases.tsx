import { draft } from "../../draft/draft";
import { Field } from "../../parts/Field";
import { Input } from "../../parts/Input";
import { id } from "../../parts/words";
import { session, since } from "../../session/session";
import { useCall } from "../../session/useCall";
import { useState } from "preact/hooks";
import { DRAFT, MOST, title } from "./comparison";

interface Props {
  chosen: string[];
  onChosen: (names: string[]) => void;
}

const SHOWN = 100;

/** Up to eight releases; the others are compared with the first. */
export function ChooseReleases({ chosen, onChosen }: Props) {
  return (
    <fieldset>
      <legend>Releases</legend>
      <ol class="draft">
        {chosen.map((name, at) => (
          <li key={name}>
            {title(name)}{" "}
            {chosen.length > 1 && (
              <button
                type="button"
                class="small"
                aria-label={`Leave out ${title(name)}`}
                onClick={() => onChosen(chosen.filter((_, index) => index !== at))}
              >
                Leave out
              </button>
            )}
          </li>
        ))}
      </ol>
      {chosen.length < MOST ? (
        <AddRelease chosen={chosen} onAdd={(name) => onChosen([...chosen, name])} />
      ) : (
        <p class="hint">Eight are shown side by side; the command line compares up to 256.</p>
      )}
    </fieldset>
  );
}

function AddRelease({ chosen, onAdd }: { chosen: string[]; onAdd: (name: string) => void }) {
  const { backpack, mayAuthor } = session.value!;
  const [typed, setTyped] = useState("");
  const call = useCall(
    mayAuthor
      ? async (signal) => {
          const [channels, made] = await Promise.all([
            backpack.releases.listChannels({}, { signal }),
            backpack.releases.listReleases({ pageSize: SHOWN }, { signal }),
          ]);
          return [
            ...channels.channels.flatMap(({ name, canary }) => [id(name), ...(canary ? [`${id(name)}:canary`] : [])]),
            ...made.releases.map(({ number }) => String(number)),
          ];
        }
      : null,
    [since.value],
  );
  if (!mayAuthor) {
    return (
      <div class="pair">
        <Field label="Another one" hint="A channel, or a number.">
          <Input value={typed} onValue={setTyped} />
        </Field>
        <button type="button" disabled={!typed || chosen.includes(typed)} onClick={() => onAdd(typed)}>
          Add
        </button>
      </div>
    );
  }
  const known = call.state === "done" ? call.value : [];
  const all = ["0", ...(draft.value.length ? [DRAFT] : []), ...known.filter((name) => name !== "0")];
  return (
    <Field label="Another one">
      <select value="" onChange={(event) => event.currentTarget.value && onAdd(event.currentTarget.value)}>
        <option value="">choose one</option>
        {all
          .filter((name) => !chosen.includes(name))
          .map((name) => (
            <option key={name} value={name}>
              {title(name)}
            </option>
          ))}
      </select>
    </Field>
  );
}
