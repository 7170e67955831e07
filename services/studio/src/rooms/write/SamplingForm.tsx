import { Field } from "../../parts/Field";
import { Input } from "../../parts/Input";
import { session } from "../../session/session";
import { SAMPLING, type SamplingFields, type SamplingName } from "./sampling";

interface Props {
  values: SamplingFields;
  onValue: (name: SamplingName, value: string) => void;
}

/** Fields that are left empty are the model's. */
export function SamplingForm({ values, onValue }: Props) {
  const defaults = session.value?.model?.samplingDefaults;
  return (
    <fieldset class="sampling">
      <legend>Sampling</legend>
      <div class="grid">
        {SAMPLING.map(({ name, label, ...rest }) => (
          <Field key={name} label={label}>
            <Input type="number" value={values[name] ?? ""} onValue={(value) => onValue(name, value)} {...rest} />
          </Field>
        ))}
      </div>
      {defaults && (
        <small class="hint">
          Left empty: temperature {defaults.temperature}, top p {defaults.topP}, top k {defaults.topK || "all"}, min p{" "}
          {defaults.minP}, repetition penalty {defaults.repetitionPenalty || 1}. Whoever names one of these five has the
          plain distribution for the others.
        </small>
      )}
    </fieldset>
  );
}
