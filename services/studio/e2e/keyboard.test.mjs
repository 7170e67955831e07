// A sense is found, an edit drafted, tried, saved, released to a canary, promoted and rolled back: by keyboard alone.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { call, key, launch, live, open } from "./browser.mjs";

const STEPS = 150;

/** Press Tab until what has the focus is called so. */
async function tabTo(page, role, name) {
  const wanted = page.getByRole(role, { name, exact: true });
  await wanted.first().waitFor();
  for (let step = 0; step < STEPS; step++) {
    if (await wanted.evaluateAll((found) => found.includes(document.activeElement))) return;
    await page.keyboard.press("Tab");
  }
  assert.fail(`Tab never comes to the ${role} “${name}”`);
}

async function press(page, role, name) {
  await tabTo(page, role, name);
  await page.keyboard.press("Enter");
}

async function fill(page, name, text) {
  await tabTo(page, "textbox", name);
  await page.keyboard.press("Control+A");
  await page.keyboard.type(text);
}

let browser;
before(async () => (browser = await launch()));
after(() => browser.close());

test("from a sense to a release and back, by keyboard", async () => {
  const { page, close } = await open(browser, { signedIn: "" });
  const was = await live();

  await page.getByLabel("API key").waitFor();
  for (let step = 0; step < 5; step++) {
    if (await page.getByLabel("API key").evaluate((input) => input === document.activeElement)) break;
    await page.keyboard.press("Tab");
  }
  await page.keyboard.type(key);
  await page.keyboard.press("Enter");

  await press(page, "link", "Words");
  await fill(page, "Word", "horse");
  await page.keyboard.press("Enter");
  await press(page, "link", "Edit sense 7");

  await tabTo(page, "combobox", "Kind");
  await page.keyboard.type("copy");
  await fill(page, "Word to copy, or WORD:SENSE", "ship");
  await page.keyboard.press("Enter");
  await page.getByRole("button", { name: "Remove copy horse:7 ship" }).waitFor();

  await fill(page, "Prompts", "The horse and the");
  await fill(page, "Words to watch", "ship");
  await page.keyboard.press("Enter");
  await page.getByRole("region", { name: "with the edits" }).waitFor();
  await page.getByText("of ordinary text").waitFor();

  await fill(page, "Patch", "by-keyboard");
  await page.keyboard.press("Enter");
  await page.getByText("Saved as by-keyboard:1").waitFor();
  assert.equal((await live()).release, was.release, "no channel moves");
  await press(page, "link", "Release it");

  await press(page, "button", "Start a canary");
  await page.getByText("for 50 in a thousand requests").waitFor();
  const { canary } = await live();
  assert.equal(canary.permille, 50);

  await press(page, "button", "Promote the canary");
  await page.getByText(`live is at release ${canary.release}. Held by`).waitFor();
  assert.equal((await live()).release, canary.release);

  await press(page, "button", `Roll back to release ${was.release}`);
  await page.getByText(`live is at release ${was.release}. Held by`).waitFor();
  assert.equal((await live()).release, was.release);
  await close();
});

test("a draft over a canary is saved with the canary's other patches, or not at all", async () => {
  const { release } = await call("ReleaseService/CreateRelease", { revisions: ["patches/by-keyboard/revisions/1"] });
  const was = await live();
  await call("ReleaseService/StartCanary", { channel: was.name, release: release.number, permille: 1, etag: was.etag });
  const { page, close } = await open(browser, { at: "#/edit?on=live:canary&edit=copy+king+ship" });
  const recipe = await page.getByLabel("On the command line", { exact: true }).last().textContent();
  assert.match(recipe, /^(\$ )?backpack steer .* --channel live:canary( |$)/m);
  const python = await page.getByLabel("In Python", { exact: true }).last().textContent();
  assert.match(python, /^ *at = steering\.channel\("live"\)\.canary\.release$/m);
  assert.match(python, /create_release\(\[\*others, revision\]\)/);
  const save = async (patch) => {
    await page.getByRole("textbox", { name: "Patch", exact: true }).fill(patch);
    await page.getByRole("button", { name: "Save and make a release" }).click();
  };
  await save("over-a-canary");
  await page.getByText("of by-keyboard:1, over-a-canary:1").waitFor();

  await call("ReleaseService/AbortCanary", { channel: was.name, etag: (await live()).etag });
  await save("over-nothing");
  await page.getByRole("alert").getByText("live has no canary any more").waitFor();
  await page.evaluate(() => (location.hash = "#/edit?on=nowhere&edit=copy+king+ship"));
  await save("over-nothing");
  await page.getByRole("alert").getByText("channels/nowhere doesn't exist").waitFor();
  const { patches = [] } = await call("PatchService/ListPatches");
  assert.ok(!patches.some(({ name }) => name.endsWith("/over-nothing")), "nothing is stored");
  await close();
});
