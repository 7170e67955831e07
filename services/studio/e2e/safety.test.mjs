// What tenants and addresses say is text; keys are refused in words, and kept in the tab.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { call, key, launch, open } from "./browser.mjs";

const HOSTILE = `<img src=x onerror="window.ran=1"><script>window.ran=1</script><svg onload="window.ran=1">{{ran}}`;

let browser;
before(async () => (browser = await launch()));
after(() => browser.close());

test("a hostile description and hostile notes run no script", async () => {
  await call("PatchService/CreatePatch", { patchId: "hostile", description: HOSTILE });
  const edits = [{ bias: { words: [{ text: "horse" }], amount: -1 } }];
  const { revision } = await call("PatchService/CreateRevision", { parent: "patches/hostile", edits });
  await call("ReleaseService/CreateRelease", { revisions: [revision.name], notes: HOSTILE });
  for (const at of ["#/release?view=patches&patch=hostile", "#/release?view=releases"]) {
    const { page, close } = await open(browser, { at });
    await page.getByText(HOSTILE).first().waitFor();
    assert.equal(await page.evaluate(() => window.ran), undefined);
    assert.equal(await page.locator("main img, main svg, main script").count(), 0);
    await close();
  }
});

test("a hostile address runs no script", async () => {
  const said = encodeURIComponent(HOSTILE);
  for (const at of [`#/words?word=${said}`, `#/edit?edit=${said}`, `#/write?prompt=${said}&on=${said}&edit=${said}`]) {
    const { page, close } = await open(browser, { at });
    await page.getByText("window.ran").first().waitFor({ state: "attached" });
    assert.equal(await page.evaluate(() => window.ran), undefined);
    assert.equal(await page.locator("main img, main svg, main script").count(), 0);
    await close();
  }
});

test("a draft with a line that is no edit is not tried in part", async () => {
  const { page, close } = await open(browser, { at: "#/write?prompt=The&edit=copy+king+ship&edit=hide+king" });
  await page.getByRole("button", { name: "Write" }).click();
  await page.getByRole("alert").getByText("there is no kind “hide”").waitFor();
  await close();
});

test("an unknown key is refused in words, and isn't kept", async () => {
  const { page, close } = await open(browser, { signedIn: "" });
  await page.getByLabel("API key").fill("bp_nobody");
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("alert").waitFor();
  assert.equal(await page.evaluate(() => sessionStorage.length), 0);
  await close();
});

test("the key is kept in the tab alone, and forgotten when one signs out", async () => {
  const { page, close } = await open(browser, { signedIn: "" });
  await page.getByLabel("API key").fill(key);
  await page.keyboard.press("Enter");
  await page.getByRole("navigation", { name: "Rooms" }).waitFor();
  assert.equal(await page.evaluate(() => JSON.stringify(localStorage)), "{}");
  assert.ok(!page.url().includes(key));
  await page.reload();
  await page.getByRole("navigation", { name: "Rooms" }).waitFor();
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByLabel("API key").waitFor();
  assert.equal(await page.evaluate(() => sessionStorage.length), 0);
  await close();
});
