// Lines of a draft, as the studio reads them: their Python goes to the test's caller, which reads them, too.
import { writeFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { launch, open, url } from "./browser.mjs";

let browser;
before(async () => (browser = await launch()));
after(() => browser.close());

test("each line is an edit", async () => {
  const read = {};
  const { page, close } = await open(browser);
  for (const line of JSON.parse(process.env.STUDIO_LINES)) {
    await page.goto(`${url}/?${Object.keys(read).length}#/edit?edit=${encodeURIComponent(line)}`);
    const recipe = page.getByLabel("In Python", { exact: true }).first();
    await recipe.waitFor({ state: "attached" });
    read[line] = await recipe.textContent();
  }
  await close();
  writeFileSync(process.env.STUDIO_RECIPES, JSON.stringify(read));
});

test("words and arguments of a form become a line that is read", async () => {
  const { page, close } = await open(browser, { at: "#/edit" });
  await page.getByLabel("Kind").selectOption("copy");
  await page.getByLabel("Words", { exact: true }).fill(`d'Or, "king"`);
  await page.getByLabel("Word to copy").fill("l'an");
  await page.getByRole("button", { name: "Add to the draft" }).click();
  await page.getByRole("button", { name: /^Remove copy/ }).waitFor();
  const python = await page.getByLabel("In Python", { exact: true }).first().textContent();
  for (const word of [`"d'Or"`, `"\\"king\\""`, `"l'an"`]) if (!python.includes(word)) throw new Error(python);
  await close();
});
