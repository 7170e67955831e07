import { Heading } from "../../parts/Heading";
import { viewOf, Views } from "../../parts/Views";
import { FindSenses } from "./FindSenses";
import { MapSense } from "./MapSense";
import { WordSenses } from "./WordSenses";
import { WordUses } from "./WordUses";

const VIEWS = {
  senses: "The senses of a word",
  find: "Find senses by what they do",
  map: "Map a sense of many words",
  uses: "Where a word is used",
};
const PLACES = { senses: WordSenses, find: FindSenses, map: MapSense, uses: WordUses };

export function WordsRoom() {
  const view = viewOf(VIEWS) as keyof typeof PLACES;
  const Place = PLACES[view];
  return (
    <>
      <Heading title="Words">
        Each word has a few senses, vectors that no text changes. A sense raises the logits of some words and lowers
        others, wherever the word stands.
      </Heading>
      <Views room="words" label="Words" views={VIEWS} />
      <Place key={view} />
    </>
  );
}
