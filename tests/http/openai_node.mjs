// What OpenAI's client for Node gets: a completion, the same as a stream, a chat, and an error.
import OpenAI from "openai";

const [url, key, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const asked = { model: "live", prompt, max_tokens: 12, seed: 3 };

const models = [];
for await (const model of client.models.list()) models.push(model.id);
const whole = await client.completions.create({ ...asked, logprobs: 1 });
let streamed = "";
let usage = null;
for await (const chunk of await client.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.text ?? "";
  usage = chunk.usage ?? usage;
}
const messages = [{ role: "user", content: "Tell me of the king" }];
const chat = await client.chat.completions.create({ model: "live", messages, max_tokens: 6, seed: 2 });
let refused = null;
try {
  await client.completions.create({ ...asked, model: "nowhere" });
} catch (error) {
  refused = { kind: error.constructor.name, status: error.status, code: error.code };
}
const { choices } = whole;
console.log(JSON.stringify({ models, text: choices[0].text, served: choices[0].served, streamed, usage, chat: chat.choices[0].message.content, refused }));
