import { cloneElement, type ComponentChildren, type VNode } from "preact";
import { useId } from "preact/hooks";

interface Props {
  label: ComponentChildren;
  hint?: ComponentChildren;
  /** An input, select or textarea. */
  children: VNode<{ id?: string; "aria-describedby"?: string }>;
}

/** An input with its label, and a hint that screen readers read with it. */
export function Field({ label, hint, children }: Props) {
  const id = useId();
  const described = hint ? { "aria-describedby": `${id}-hint` } : {};
  return (
    <div class="field">
      <label for={id}>{label}</label>
      {cloneElement(children, { id, ...described })}
      {hint && (
        <small id={`${id}-hint`} class="hint">
          {hint}
        </small>
      )}
    </div>
  );
}
