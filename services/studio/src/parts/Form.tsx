import type { ComponentChildren } from "preact";

interface Props {
  label: string;
  class?: string;
  onSubmit: () => void;
  children: ComponentChildren;
}

/** A form that the page answers itself. */
export function Form({ label, onSubmit, children, ...rest }: Props) {
  return (
    <form
      aria-label={label}
      {...rest}
      onSubmit={(event) => {
        event.preventDefault();
        onSubmit();
      }}
    >
      {children}
    </form>
  );
}
