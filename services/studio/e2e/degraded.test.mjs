// A release that makes ordinary text much worse moves no channel, unless one says so twice.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { call, launch, live, open } from "./browser.mjs";

let browser;
before(async () => (browser = await launch()));
after(() => browser.close());

test("a release that makes ordinary text much worse", async () => {
  const was = await live();
  await call("PatchService/CreatePatch", { patchId: "mute" });
  const edits = [{ bias: { words: [{ text: "the" }, { text: "of" }], amount: -20 } }];
  const { revision } = await call("PatchService/CreateRevision", { parent: "patches/mute", edits });
  const { release } = await call("ReleaseService/CreateRelease", { revisions: [revision.name] });

  const { page, close } = await open(browser, { at: `#/release?release=${release.number}` });
  const shown = (number) => page.locator("#channel-live + p").getByText(`release ${number}`, { exact: true }).waitFor();
  await page.getByText("Channels may refuse it.").waitFor();
  await page.getByRole("button", { name: "Activate for all" }).click();
  await page.getByRole("button", { name: "Move it all the same" }).waitFor();
  assert.match(await page.getByRole("alert").innerText(), /DEGRADES/);
  assert.equal((await live()).release, was.release);

  await call("ReleaseService/Activate", { channel: was.name, release: "0", etag: was.etag });
  await shown("0");
  await page.getByRole("button", { name: "Move it all the same" }).click();
  await page.getByRole("alert").getByText("Somebody else changed it meanwhile.").waitFor();
  assert.equal((await live()).release ?? "0", "0");
  await call("ReleaseService/Rollback", { channel: was.name, etag: (await live()).etag });
  await shown(was.release);

  await page.getByRole("button", { name: "Activate for all" }).click();
  await page.getByRole("button", { name: "Move it all the same" }).click();
  await page.getByText(`live is at release ${release.number}. Held by`).waitFor();
  assert.equal((await live()).release, release.number);
  await page.getByRole("button", { name: `Roll back to release ${was.release}` }).click();
  await page.getByText(`live is at release ${was.release}. Held by`).waitFor();

  await call("ReleaseService/CreateRelease", { revisions: [revision.name], notes: "never served" });
  const { releases } = await call("ReleaseService/ListReleases", {});
  const unused = releases.find(({ notes }) => notes === "never served").number;
  await page.goto(`${page.url().split("#")[0]}#/release?view=releases&release=${unused}`);
  await page.getByRole("button", { name: `Delete release ${unused}` }).click();
  await page.getByRole("button", { name: "Delete it" }).click();
  await page.getByRole("link", { name: `release ${unused}`, exact: true }).waitFor({ state: "detached" });
  await close();
});
