// Headless Chromium before a server that the test's caller started: its address and keys are in the environment.
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

export const {
  STUDIO_URL: url,
  STUDIO_KEY: key,
  STUDIO_CALLER_KEY: callerKey,
  STUDIO_ADMIN_KEY: adminKey,
} = process.env;

export function launch() {
  return chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
}

/** A page that fails the test for an error, a script that the policy refuses, or a request to anywhere else. */
export async function open(browser, { theme = "light", width = 1280, signedIn = key, at = "" } = {}) {
  const context = await browser.newContext({ colorScheme: theme, viewport: { width, height: 900 } });
  const page = await context.newPage();
  const wrong = [];
  page.on("pageerror", (error) => wrong.push(error.message));
  page.on("console", (message) => /policy|trusted/i.test(message.text()) && wrong.push(message.text()));
  page.on("request", (request) => {
    if (!request.url().startsWith(`${url}/`)) wrong.push(`a request to ${request.url()}`);
    if (signedIn && request.url().includes(signedIn)) wrong.push("the key is in an address");
  });
  if (signedIn) {
    await page.addInitScript((secret) => {
      if (!sessionStorage.getItem("backpack-key")) sessionStorage.setItem("backpack-key", secret);
    }, signedIn);
  }
  await page.goto(`${url}/${at}`);
  if (signedIn) await page.getByRole("navigation", { name: "Rooms" }).waitFor();
  return { page, close: async () => (assert.deepEqual(wrong, []), context.close()) };
}

/** Call the server as the studio does, beside it. */
export async function call(method, body = {}, secret = key) {
  const answer = await fetch(`${url}/backpack.v1.${method}`, {
    method: "POST",
    headers: { authorization: `Bearer ${secret}`, "content-type": "application/json" },
    body: JSON.stringify(body),
  });
  assert.equal(answer.status, 200, await answer.clone().text());
  return answer.json();
}

export async function live() {
  const { channels } = await call("ReleaseService/ListChannels");
  return channels.find(({ name }) => name.endsWith("/live"));
}
