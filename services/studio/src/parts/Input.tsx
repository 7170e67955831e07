interface Props {
  id?: string;
  type?: "text" | "number" | "password";
  value: string;
  onValue: (value: string) => void;
  required?: boolean;
  placeholder?: string;
  pattern?: string;
  title?: string;
  step?: string;
  min?: string;
  max?: string;
}

/** An input of one line, for words of a language model: no correction, no completion. */
export function Input({ value, onValue, ...rest }: Props) {
  return (
    <input
      autocomplete="off"
      autocapitalize="off"
      spellcheck={false}
      {...(rest as object)} // Preact's types want the type of an input to be known when it is written
      value={value}
      onInput={(event) => onValue(event.currentTarget.value)}
    />
  );
}
