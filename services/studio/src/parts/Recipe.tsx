interface Props {
  shell: string[];
  python: string[];
}

/** How to do the same without the studio. */
export function Recipe({ shell, python }: Props) {
  return (
    <details class="recipe">
      <summary>On the command line and in Python</summary>
      <pre tabIndex={0} aria-label="On the command line">
        {shell.map((line) => `$ ${line}\n`)}
      </pre>
      <pre tabIndex={0} aria-label="In Python">
        {python.join("\n")}
      </pre>
    </details>
  );
}
