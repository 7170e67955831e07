import { useState } from "preact/hooks";

interface Props {
  /** On the button, such as "Suspend". */
  label: string;
  /** What it is done to, for screen readers. */
  of: string;
  /** What then happens. */
  means: string;
  /** While a write runs. */
  disabled: boolean;
  onConfirm: () => void;
}

/** A button for what can't be taken back, or ends somebody's service: it asks once more. */
export function Confirmed({ label, of, means, disabled, onConfirm }: Props) {
  const [asking, setAsking] = useState(false);
  if (!asking) {
    return (
      <button
        type="button"
        class="small"
        aria-label={`${label} ${of}`}
        disabled={disabled}
        onClick={() => setAsking(true)}
      >
        {label}
      </button>
    );
  }
  return (
    <span class="confirm" role="group" aria-label={`${label} ${of}?`}>
      <span>{means}</span>{" "}
      <button
        type="button"
        class="small primary"
        disabled={disabled}
        ref={(button) => button?.focus()}
        onClick={() => {
          setAsking(false);
          onConfirm();
        }}
      >
        {label} it
      </button>{" "}
      <button type="button" class="small" onClick={() => setAsking(false)}>
        Leave it
      </button>
    </span>
  );
}
