import { Heading } from "../../parts/Heading";
import { viewOf, Views } from "../../parts/Views";
import { FindSenses } from "./FindSenses";
import { WordSenses } from "./WordSenses";

const VIEWS = { senses: "The senses of a word", find: "Find senses by what they do" };

export function WordsRoom() {
  return (
    <>
      <Heading title="Words">
        Each word has a few senses, vectors that no text changes. A sense raises the logits of some words and lowers
        others, wherever the word stands.
      </Heading>
      <Views room="words" label="Words" views={VIEWS} />
      {viewOf(VIEWS) === "find" ? <FindSenses /> : <WordSenses />}
    </>
  );
}
