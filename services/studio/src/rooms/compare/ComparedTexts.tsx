import { title, type Comparison } from "./comparison";

/** How the text goes on under each release, greedily. */
export function ComparedTexts({ comparison: { prompt, columns } }: { comparison: Comparison }) {
  if (columns.every((column) => !column.text)) return null;
  return (
    <section class="panel" aria-labelledby="texts">
      <h2 id="texts">How it goes on</h2>
      <div class="sides">
        {columns.map(({ name, text }) => (
          <section key={name} aria-label={title(name)}>
            <h3>{title(name)}</h3>
            <p class="written">
              <span class="quiet">{prompt}</span>
              {text}
            </p>
          </section>
        ))}
      </div>
    </section>
  );
}
