import type { Step } from "./tint";

export function Legend({ of, steps }: { of: string; steps: Step[] }) {
  return (
    <ul class="legend" aria-label={of}>
      <li aria-hidden="true">{of}</li>
      {steps.map((step) => (
        <li key={step.class}>
          <span class={`token ${step.class}`} aria-hidden="true">
            {"  "}
          </span>{" "}
          {step.label}
        </li>
      ))}
    </ul>
  );
}
