// What tenants and addresses say is text; keys are refused in words, and kept in the tab.
import assert from "node:assert/strict";
import { writeFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { adminKey, call, key, launch, open, url } from "./browser.mjs";

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

/** Each would run `ran` where a shell, a terminal or Python is given it as it is, or between quotes of its own. */
const INJECTED = ["$(ran)1);ran(", `1';ran;'");ran("`, "\x03\x1b[201~\rran\r", "\\';ran;\x01"];

test("what an address says is quoted in each recipe", async () => {
  const recipes = { shell: [], python: [] };
  const { page, close } = await open(browser);
  for (const injected of INJECTED) {
    const said = encodeURIComponent(injected);
    for (const at of [
      `write?prompt=${said}&on=${said}&max_tokens=${said}&top_p=${said}`,
      `write?prompt=${said}&on=${said}&max_tokens=${said}&edit=copy+king+${said}`,
      `words?word=${said}&on=${said}`,
      `words?view=find&find=${said}&against=${said}&prompt=${said}&effect=${said}&order=${said}&on=${said}`,
      `words?view=map&sense=${said}&words=${said}&toward=${said}&against=${said}&on=${said}`,
      `words?view=uses&word=${said}&on=${said}`,
      `edit?prompt=${said}&targets=${said}&on=${said}&edit=copy+king+${said}`,
      `compare?with=${said}&with=live&targets=${said}&on=${said}`,
      `release?release=${said}`,
      `release?view=releases&release=${said}`,
      `release?view=patches&patch=${said}`,
      "release?view=audit",
    ]) {
      await page.goto(`${url}/?${recipes.shell.length}#/${at}`); // a page of its own: no field keeps what it had
      await page.getByLabel("On the command line", { exact: true }).first().waitFor({ state: "attached" });
      recipes.shell.push(...(await page.getByLabel("On the command line", { exact: true }).allTextContents()));
      recipes.python.push(...(await page.getByLabel("In Python", { exact: true }).allTextContents()));
    }
  }
  await close();
  assert.ok(recipes.shell.filter((text) => text.includes("ran")).length >= 7 * INJECTED.length);
  if (process.env.STUDIO_RECIPES) writeFileSync(process.env.STUDIO_RECIPES, JSON.stringify(recipes));
});

test("who presses twice makes one key, and sees its secret", async () => {
  const count = async () => {
    const { keys } = await call("TenantService/ListApiKeys", { parent: "tenants/harbour", pageSize: 200 }, adminKey);
    return keys.length;
  };
  const { page, close } = await open(browser, { signedIn: adminKey, at: "#/fleet?tenant=harbour" });
  const before = await count();
  await page.route("**/*/CreateApiKey", async (route) => {
    await new Promise((resolve) => setTimeout(resolve, 500));
    await route.continue();
  });
  await page.getByRole("button", { name: "Make a key" }).focus();
  for (let pressed = 0; pressed < 2; pressed++) await page.keyboard.press("Enter");
  await page.locator("code.secret").waitFor();
  assert.equal(await count(), before + 1);
  await close();
});

test("a key's secret stays, wherever one goes before it comes, until it is put away", async () => {
  const { page, close } = await open(browser, { signedIn: adminKey, at: "#/fleet?tenant=harbour" });
  let answer;
  const held = new Promise((resolve) => (answer = resolve));
  await page.route("**/*/CreateApiKey", async (route) => {
    await held;
    await route.continue();
  });
  await page.getByRole("button", { name: "Make a key" }).click();
  await page.getByRole("link", { name: "Keys of system" }).click();
  await page.getByRole("heading", { name: "Keys of system" }).waitFor();
  answer();
  await page.getByText("The new key of harbour, shown this once").waitFor();
  const secret = await page.locator("code.secret").textContent();
  await page.evaluate(() => (location.hash = "#/write"));
  await page.locator("code.secret").waitFor({ state: "detached" });
  await page.getByRole("link", { name: "Fleet", exact: true }).click();
  assert.equal(await page.locator("code.secret").textContent(), secret);
  await page.getByRole("button", { name: "I have kept it" }).click();
  await page.locator("code.secret").waitFor({ state: "detached" });
  await close();
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
