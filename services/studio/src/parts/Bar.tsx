interface Props {
  value: number;
  /** The value of a bar of full length. */
  most: number;
}

/** A value's size and sign as a bar; the figure stands beside it. */
export function Bar({ value, most }: Props) {
  const share = most > 0 ? Math.min(1, Math.abs(value) / most) : 0;
  return (
    <span class={`bar ${value < 0 ? "down" : "up"}`} aria-hidden="true">
      <span style={{ width: `${100 * share}%` }} />
    </span>
  );
}
