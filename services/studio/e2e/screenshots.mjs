// Pictures of the rooms for docs/studio, in both themes, before `backpack run` with its example tenants and the default
// model: STUDIO_URL and the keys are in the environment, as for the tests. `node e2e/screenshots.mjs FOLDER [ROOM…]`.
import { adminKey, call, key, launch, url } from "./browser.mjs";

const [folder, ...wanted] = process.argv.slice(2);
const PROMPT = "How+to+take+care+of+a+horse%3A";
const SHIP = "ship+sail+whale+storm+captain+horse+car+doctor+nurse+bank+money+church+river+sea+hospital+engine+road+island+crew+boat";

const ROOMS = {
  write: {
    at: `#/write?prompt=${PROMPT}&max_tokens=40&temperature=0&repetition_penalty=1.2&colour=change`,
    height: 925,
    until: async (page) => {
      await page.getByRole("button", { name: "Write", exact: true }).click();
      await page.locator("button.more1, button.more2").first().waitFor();
      await page.getByRole("button", { name: /^␣crew / }).first().click();
      await page.getByText("Its logit").waitFor();
    },
  },
  words: { at: "#/words?word=ship", height: 1250, until: (page) => page.getByRole("table").waitFor() },
  map: { at: `#/words?view=map&sense=15&words=${SHIP}`, height: 1040, until: (page) => page.locator("svg").waitFor() },
  uses: { at: "#/words?view=uses&word=bank", height: 1250, until: (page) => page.locator("mark").first().waitFor() },
  edit: {
    at: `#/edit?edit=copy+horse+car&prompt=${PROMPT}`,
    height: 1073,
    until: async (page) => {
      await page.getByRole("button", { name: "Try", exact: true }).click();
      await page.getByText("of ordinary text").waitFor();
      await page.getByRole("region", { name: "with the edits" }).waitFor();
    },
  },
  compare: {
    at: `#/compare?with=0&with=1&with=2&prompt=${PROMPT}&targets=ship`,
    height: 1250,
    until: (page) => page.getByText("How it goes on").waitFor(),
  },
  release: { at: "#/release?release=3", height: 924, until: (page) => page.getByText("2,040 tokens").waitFor() },
  fleet: { at: "#/fleet?tenant=harbour", signedIn: adminKey, height: 800, until: (page) => page.getByRole("table").waitFor() },
  replicas: {
    at: "#/fleet?view=replicas",
    signedIn: adminKey,
    height: 480,
    until: async (page) => {
      const busy = Array.from({ length: 6 }, () => write(600));
      await page.waitForTimeout(2500);
      page.once("close", () => busy.forEach((each) => each.catch(() => {})));
    },
  },
};

function write(maxTokens) {
  const sampling = { maxTokens, temperature: 1, ignoreEndOfText: true };
  return call("InferenceService/Generate", { prompt: { text: "The" }, sampling });
}

const browser = await launch();
for (const [room, { at, height, signedIn = key, until }] of Object.entries(ROOMS)) {
  if (wanted.length && !wanted.includes(room)) continue;
  for (const theme of ["light", "dark"]) {
    const context = await browser.newContext({ colorScheme: theme, viewport: { width: 1200, height } });
    const page = await context.newPage();
    page.setDefaultTimeout(120_000);
    await page.addInitScript((secret) => sessionStorage.setItem("backpack-key", secret), signedIn);
    await page.goto(`${url}/${at}`);
    await until(page);
    await page.evaluate(() => (document.activeElement.blur(), scrollTo(0, 0)));
    await page.waitForTimeout(500);
    await page.screenshot({ path: `${folder}/${room}-${theme}.png` });
    await context.close();
  }
}
await browser.close();
