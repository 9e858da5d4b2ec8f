// The scenarios that k6_scenarios.py runs, one by its name in SCENARIO: images and texts over gRPC,
// and OpenAI's API over HTTP.
import { check } from "k6";
import encoding from "k6/encoding";
import http from "k6/http";
import grpc from "k6/net/grpc";

const WORK = {
  classify: { exec: "classify", vus: 8, iterations: 200 },
  generate: { exec: "generate", vus: 4, iterations: 16 },
  complete: { exec: "complete", vus: 4, iterations: 16 },
};
const WORDS = 8;
const json = { headers: { "content-type": "application/json" }, timeout: "120s" };
const image = encoding.b64encode(open(__ENV.IMAGE, "b"));
const client = new grpc.Client();
if (__ENV.PROTOS) client.load([__ENV.PROTOS], "ladderstitch/v1/generation.proto");
let connected = false;

export const options = {
  scenarios: {
    [__ENV.SCENARIO]: { executor: "shared-iterations", maxDuration: "120s", ...WORK[__ENV.SCENARIO] },
  },
  thresholds: { checks: ["rate==1"], http_req_failed: ["rate==0"] },
};

function connect(reflect) {
  if (!connected) client.connect(__ENV.LADDERSTITCH_GRPC, { plaintext: true, reflect });
  connected = true;
}

export function classify() {
  connect(true);
  const request = { modelName: __ENV.LADDERSTITCH_IMAGE_MODEL, encodedImage: image };
  const parameters = { metadata: { "x-latency-budget-ms": "2000" }, timeout: "60s" };
  const answer = client.invoke("ladderstitch.v1.InferenceService/Infer", request, parameters);
  check(answer, {
    "status is OK": (a) => a.status === grpc.StatusOK,
    "has classes": (a) => a.message.predictions[0].top.length === 5,
    "has the budget": (a) => a.message.accounting.budgetUs === "2000000",
  });
}

export function generate() {
  connect(false);
  const tokens = [];
  const stream = new grpc.Stream(client, "ladderstitch.v1.GenerationService/Generate");
  stream.on("data", (part) => tokens.push(part));
  stream.on("error", (error) => check(error, { "no error": () => false }));
  stream.on("end", () => {
    check(tokens, {
      "tokens in order": (t) => t.every((part, k) => (part.index || 0) === k),
      "cut off": (t) => t.length === WORDS && t[WORDS - 1].finishReason === "FINISH_REASON_LENGTH",
    });
  });
  stream.write({
    modelName: __ENV.LADDERSTITCH_TEXT_MODEL,
    text: "The house",
    maxTokens: WORDS,
    ignoreEndTokens: true,
  });
  stream.end();
}

export function complete() {
  const url = `${__ENV.LADDERSTITCH_HTTP}/completions`;
  const body = {
    model: __ENV.LADDERSTITCH_TEXT_MODEL,
    prompt: "The house",
    max_tokens: WORDS,
    ignore_eos: true,
  };
  check(http.post(url, JSON.stringify(body), json), {
    "status is 200": (r) => r.status === 200,
    "has tokens": (r) => r.json("usage.completion_tokens") === WORDS,
  });
  check(http.post(url, JSON.stringify({ ...body, stream: true }), json), {
    "is a stream": (r) => r.headers["Content-Type"].startsWith("text/event-stream"),
    "is complete": (r) => r.body.trim().endsWith("data: [DONE]"),
  });
}
