/** Words as a POSIX shell has them, and Python's shlex, which reads the same lines: how an edit's line is cut. */

const PART = /'([^']*)'|"((?:[^"\\]|\\[\s\S])*)"|\\([\s\S])|(\s+)|([^\s'"\\]+)/y;

/** Throws an Error for a quote that isn't closed. */
export function splitWords(line: string): string[] {
  const words: string[] = [];
  let word: string | undefined;
  for (let at = 0; at < line.length; at = PART.lastIndex) {
    PART.lastIndex = at;
    const found = PART.exec(line);
    if (!found) throw new Error(`“${line}” has a quote that isn't closed; write ' as "'" or \\'`);
    const [, single, double, escaped, space, plain] = found;
    if (space !== undefined) {
      if (word !== undefined) words.push(word);
      word = undefined;
    } else {
      word = (word ?? "") + (single ?? double?.replace(/\\(["\\])/g, "$1") ?? escaped ?? plain!);
    }
  }
  return word === undefined ? words : [...words, word];
}

/** One word, quoted if need be, as Python's shlex.quote does. */
export function quotedWord(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;
}
