// /// script
// dependencies = ["openai@7.57.0"]
//
// [tool.ladderstitch]
// package = "openai"
// ///
// OpenAI's package of npm: completions, chats, streams, JSON schema, tools, and use in a browser.

import assert from "node:assert/strict";
import http from "node:http";
import OpenAI from "openai";

const URL_ = process.env.LADDERSTITCH_HTTP;
const MODEL = process.env.LADDERSTITCH_TEXT_MODEL;
const ORIGIN = "http://localhost:3000";
const SAFE_HEADERS = ["accept", "content-length", "content-language", "accept-language"];
const SCHEMA = {
  type: "object",
  properties: { kind: { enum: ["cat", "dog"] }, age: { type: "integer", maximum: 30 } },
  required: ["kind", "age"],
  additionalProperties: false,
};
const TOOL = { type: "function", function: { name: "note", parameters: SCHEMA } };
const messages = [{ role: "user", content: "A pet" }];
const client = new OpenAI({ baseURL: URL_, apiKey: "x", maxRetries: 0 });

function ok(what) {
  console.log(`ok ${what}`);
}

function checkPet(text) {
  const pet = JSON.parse(text);
  assert.ok(["cat", "dog"].includes(pet.kind) && Number.isInteger(pet.age), text);
}

async function lists() {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.ok(names.includes(MODEL));
  ok("list of models");
}

async function completions() {
  const body = { model: MODEL, prompt: ["one", "two"], max_tokens: 5, n: 2, ignore_eos: true };
  const { data, request_id } = await client.completions.create(body).withResponse();
  assert.equal(data.choices.length, 4);
  assert.equal(data.usage.completion_tokens, 20);
  assert.ok(request_id);
  ok("completions: 2 prompts, 2 answers each");
}

async function chatStream() {
  const options = { max_tokens: 6, ignore_eos: true, stream_options: { include_usage: true } };
  const stream = client.chat.completions.stream({ model: MODEL, messages, ...options });
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const last = await stream.finalChatCompletion();
  assert.equal(last.choices[0].message.content, text);
  assert.equal(last.usage.completion_tokens, 6);
  ok("chat stream");
  const aborted = await client.chat.completions.create({ model: MODEL, messages, stream: true });
  for await (const chunk of aborted) {
    assert.equal(chunk.object, "chat.completion.chunk");
    break; // closes the connection
  }
  ok("chat stream that the caller ends");
}

async function schema() {
  const response_format = { type: "json_schema", json_schema: { name: "pet", schema: SCHEMA } };
  const answer = await client.chat.completions.parse({ model: MODEL, messages, response_format });
  checkPet(answer.choices[0].message.content);
  ok("JSON schema");
}

async function tools() {
  const options = { tools: [TOOL], tool_choice: "required", seed: 1, temperature: 0.5 };
  const answer = await client.chat.completions.create({ model: MODEL, messages, ...options });
  const [call] = answer.choices[0].message.tool_calls;
  checkPet(call.function.arguments);
  ok("tools");
  const stream = client.chat.completions.stream({ model: MODEL, messages, ...options });
  const [streamed] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
  assert.equal(streamed.function.arguments, call.function.arguments);
  ok("tools in a stream");
  const result = { role: "tool", tool_call_id: call.id, content: "noted" };
  const after = [...messages, answer.choices[0].message, result];
  await client.chat.completions.create({ model: MODEL, messages: after, max_tokens: 5 });
  ok("result of a tool");
}

async function responses() {
  const request = { model: MODEL, input: "A pet", max_output_tokens: 5 };
  const events = [];
  for await (const event of await client.responses.create({ ...request, stream: true })) {
    events.push(event.type);
  }
  assert.equal(events[0], "response.created");
  assert.match(events.at(-1), /^response\.(completed|incomplete)$/);
  ok("stream of responses");
}

async function errors() {
  const request = { model: "no-such-model", messages };
  await assert.rejects(client.chat.completions.create(request), OpenAI.NotFoundError);
  const wrong = { model: MODEL, messages, temperature: -1 };
  await assert.rejects(client.chat.completions.create(wrong), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    return error.param === "temperature";
  });
  ok("errors");
}

/** Send a request with headers that `fetch` would not let a page set; return its answer. */
function send(method, url, headers) {
  return new Promise((resolve, reject) => {
    const request = http.request(url, { method, headers }, (response) => {
      response.resume().on("end", () => resolve(response));
    });
    request.on("error", reject).end();
  });
}

/** A `fetch` that asks first, as a browser does for a page of another origin. */
async function browserFetch(url, options) {
  const names = [...new Headers(options.headers).keys()].filter((n) => !SAFE_HEADERS.includes(n));
  const asked = await send("OPTIONS", url, {
    origin: ORIGIN,
    "access-control-request-method": options.method.toUpperCase(),
    "access-control-request-headers": names.sort().join(","),
  });
  assert.equal(asked.statusCode, 200, "status of the preflight");
  const allowed = asked.headers["access-control-allow-headers"].toLowerCase().split(/,\s*/);
  assert.deepEqual(names.filter((name) => !allowed.includes(name)), []);
  const headers = { ...Object.fromEntries(new Headers(options.headers)), origin: ORIGIN };
  const response = await fetch(url, { ...options, headers });
  assert.equal(response.headers.get("access-control-allow-origin"), ORIGIN);
  const exposed = response.headers.get("access-control-expose-headers") ?? "";
  assert.ok(exposed.toLowerCase().includes("x-request-id"), `exposed: ${exposed}`);
  return response;
}

async function browser() {
  const options = { baseURL: URL_, apiKey: "x", maxRetries: 0, fetch: browserFetch };
  const page = new OpenAI({ ...options, dangerouslyAllowBrowser: true });
  const stream = await page.chat.completions.create(
    { model: MODEL, messages, max_tokens: 5, stream: true },
    { headers: { "x-llm-d-slo-ttft-ms": "5000" } },
  );
  for await (const chunk of stream) assert.ok(chunk.id);
  ok("a page of another origin: preflight and stream");
}

for (const check of [lists, completions, chatStream, schema, tools, responses, errors, browser]) {
  await check();
}
