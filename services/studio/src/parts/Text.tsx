interface Props {
  id?: string;
  rows: number;
  value: string;
  onValue: (value: string) => void;
  required?: boolean;
}

/** An input of several lines. Control and Enter send the form, as Enter does from one line. */
export function Text({ value, onValue, ...rest }: Props) {
  return (
    <textarea
      spellcheck={false}
      {...rest}
      value={value}
      onInput={(event) => onValue(event.currentTarget.value)}
      onKeyDown={(event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.currentTarget.form?.requestSubmit();
      }}
    />
  );
}
