import { useState } from "preact/hooks";
import { link, on } from "../../address";
import { draft, readableEdits } from "../../draft/draft";
import { pythonEdits } from "../../draft/python";
import { asTenant, withSteering } from "../../parts/asking";
import { Done } from "../../parts/Done";
import { Field } from "../../parts/Field";
import { Form } from "../../parts/Form";
import { Input } from "../../parts/Input";
import { Outcome } from "../../parts/Outcome";
import { Recipe } from "../../parts/Recipe";
import { channelOf, literal, quoted, revisionId } from "../../parts/words";
import { isNumber } from "../../session/request";
import { useAction } from "../../session/useCall";
import { save } from "./saving";

/** The draft stored as a revision of a patch, and released beside the channel's other patches. */
export function SaveDraft() {
  const channel = isNumber(on.value) ? "live" : on.value;
  const [patch, setPatch] = useState("");
  const [description, setDescription] = useState("");
  const [alone, setAlone] = useState(false);
  const saved = useAction(() => save(patch, description, channel, alone));
  return (
    <section class="panel" aria-labelledby="save">
      <h2 id="save">Save it</h2>
      <Form label="Save the draft" onSubmit={() => void saved.start()}>
        <div class="pair">
          <Field label="Patch" hint="Made if there is none of this name; else it gets a new revision.">
            <Input
              value={patch}
              onValue={setPatch}
              required
              pattern="[a-z][a-z0-9\-]{0,62}"
              title="Small letters, digits and “-”, a letter first"
            />
          </Field>
          <Field label="What it is for">
            <Input value={description} onValue={setDescription} />
          </Field>
        </div>
        <label class="check">
          <input type="checkbox" checked={alone} onChange={(event) => setAlone(event.currentTarget.checked)} />
          <span>Release it alone, without the other patches of {channel}</span>
        </label>
        <div class="buttons">
          <button class="primary" disabled={saved.call.state === "running"}>
            Save and make a release
          </button>
          <span class="quiet">No channel moves yet.</span>
        </div>
      </Form>
      <Outcome call={saved.call} of="the intervention service">
        {({ revision, release }) => (
          <Done>
            <p>
              Saved as <code>{revisionId(revision.name)}</code>, in release {String(release.number)} of{" "}
              {release.revisions.map(revisionId).join(", ")}.
            </p>
            <a class="button primary" href={link("release", { release: String(release.number), edit: [] })}>
              Release it
            </a>
          </Done>
        )}
      </Outcome>
      <Recipe {...recipe(patch || "NAME", channel, alone)} />
    </section>
  );
}

function recipe(patch: string, channel: string, alone: boolean) {
  const edits = draft.value.map(quoted).join(" ");
  const { list, names } = pythonEdits(readableEdits());
  const named = channelOf(channel);
  const at = named === channel ? "release" : "canary.release";
  const others = [
    `at = steering.channel(${literal(named)}).${at}`,
    `others = [each for each in steering.release(at).revisions if each.rpartition(":")[0] != ${literal(patch)}]`,
  ];
  return {
    shell: [
      `backpack steer ${quoted(patch)} ${edits} --channel ${quoted(channel)}${alone ? " --alone" : ""}${asTenant()}`,
    ],
    python: withSteering(
      [...names, "Steering"].join(", "),
      ...(alone ? [] : others),
      `steering.create_patch(${literal(patch)}, exist_ok=True)`,
      `revision = steering.create_revision(${literal(patch)}, ${list})`,
      `print(steering.create_release([${alone ? "" : "*others, "}revision]).number)`,
    ),
  };
}
