// Each room, in both themes and narrow: axe finds nothing, nothing overflows, and what is refused is said.
import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { after, before, test } from "node:test";
import { adminKey, callerKey, launch, open } from "./browser.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

const ROOMS = {
  write: {
    at: "#/write?prompt=The+horse+and+the&max_tokens=12&temperature=0&edit=copy+king+ship",
    until: async (page) => {
      await page.getByRole("button", { name: "Write" }).click();
      await page.getByText("12 tokens, as many as were allowed").waitFor();
      await page.locator("button.token").nth(5).click();
      await page.getByRole("table").waitFor();
    },
  },
  "write, by what edits changed": {
    at: "#/write?prompt=The+man+and+the&max_tokens=8&edit=copy+man+ship&colour=change",
    until: async (page) => {
      await page.getByRole("button", { name: "Write" }).click();
      await page.locator("button.less1, button.less2, button.more1, button.more2").first().waitFor();
    },
  },
  words: { at: "#/words?word=horse&sense=3", until: (page) => page.getByRole("table").waitFor() },
  map: {
    at: "#/words?view=map&sense=3&words=king+queen+ship+sea+horse&edit=copy+king+ship",
    until: (page) => page.getByRole("img", { name: "Sense 3 of 5 words" }).waitFor(),
  },
  "map, towards a word": {
    at: "#/words?view=map&sense=3&words=king+queen+ship+sea+horse&toward=sea&against=king",
    until: (page) => page.getByText("x is what the sense adds to the logits of “sea”").waitFor(),
  },
  uses: { at: "#/words?view=uses&word=king", until: (page) => page.locator("mark").first().waitFor() },
  find: { at: "#/words?view=find&find=ship&prompt=The+king", until: (page) => page.getByRole("table").waitFor() },
  edit: {
    at: "#/edit?edit=copy+king+ship&edit=scale+horse%3A2+0&prompt=The+king",
    until: async (page) => {
      await page.getByText("From a patch, or a file").click();
      await page.getByRole("button", { name: "Try", exact: true }).click();
      await page.getByText("of ordinary text").waitFor();
      await page.getByRole("region", { name: "with the edits" }).waitFor();
    },
  },
  compare: {
    at: "#/compare?with=0&with=live&with=draft&prompt=The+king+of+the&targets=ship&edit=copy+king+ship",
    until: (page) => page.getByText("How it goes on").waitFor(),
  },
  channels: { at: "#/release?release=1", until: (page) => page.getByText("holds it").first().waitFor() },
  releases: {
    at: "#/release?view=releases&release=1&against=0",
    until: async (page) => {
      await page.getByLabel("Difference").waitFor();
      await page.getByText("of ordinary text").waitFor();
    },
  },
  patches: { at: "#/release?view=patches&patch=royal", until: (page) => page.getByRole("article").first().waitFor() },
  audit: { at: "#/release?view=audit", until: (page) => page.getByText("is intact").waitFor() },
  fleet: { signedIn: adminKey, at: "#/fleet?tenant=harbour", until: (page) => page.getByRole("table").waitFor() },
  readers: { signedIn: adminKey, at: "#/fleet?view=readers", until: (page) => page.getByRole("table").waitFor() },
  replicas: { signedIn: adminKey, at: "#/fleet?view=replicas", until: (page) => page.getByText("takes requests").waitFor() },
  "uses that the key isn't shown": {
    signedIn: callerKey,
    at: "#/words?view=uses&word=king",
    until: (page) => page.getByText("this needs author").waitFor(),
  },
  "a room that the key doesn't open": {
    signedIn: callerKey,
    at: "#/release",
    until: (page) => page.getByText("needs a key with the role author or releaser").waitFor(),
  },
  "sign in": { signedIn: "", until: (page) => page.getByLabel("API key").waitFor() },
};

/** What rooms say to do elsewhere, for whoever runs it there. */
const recipes = { shell: [], python: [] };

let browser;
before(async () => (browser = await launch()));
after(async () => {
  await browser.close();
  if (process.env.STUDIO_RECIPES) writeFileSync(process.env.STUDIO_RECIPES, JSON.stringify(recipes));
});

for (const [name, { until, ...options }] of Object.entries(ROOMS)) {
  for (const theme of ["light", "dark"]) {
    test(`${name}, ${theme}: axe finds nothing`, async () => {
      const { page, close } = await open(browser, { theme, ...options });
      await until(page);
      for (const summary of await page.locator(".recipe > summary").all()) await summary.click();
      recipes.shell.push(...(await page.getByLabel("On the command line", { exact: true }).allTextContents()));
      recipes.python.push(...(await page.getByLabel("In Python", { exact: true }).allTextContents()));
      await page.evaluate(AXE);
      const { violations } = await page.evaluate(() => window.axe.run());
      assert.deepEqual(
        violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`),
        [],
      );
      await close();
    });
  }
  test(`${name}: nothing is wider than a narrow screen`, async () => {
    const { page, close } = await open(browser, { width: 360, ...options });
    await until(page);
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(width <= 360, `${width} pixels`);
    await close();
  });
}
