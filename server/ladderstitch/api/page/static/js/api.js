// Calls of the server that sent this page, with the token that its user entered.

const TOKEN_KEY = 'ladderstitch-token';

/** An answer with an error: the HTTP status, the message and the machine-readable code. */
export class CallFailed extends Error {
  constructor(status, message, code, retryAfterS) {
    super(message);
    Object.assign(this, { status, code, retryAfterS });
  }
}

// The token lasts as long as the tab: other tabs, and later visitors, have to enter it again.
export const token = {
  get: () => sessionStorage.getItem(TOKEN_KEY) ?? '',
  set: (value) => sessionStorage.setItem(TOKEN_KEY, value),
  forget: () => sessionStorage.removeItem(TOKEN_KEY),
};

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? {};
  const retry = Number(response.headers.get('retry-after') ?? 0);
  throw new CallFailed(response.status, error.message ?? `HTTP ${response.status}`, error.code, retry);
}

const post = (path, body, headers = {}, signal = undefined) => call(path, {
  method: 'POST',
  body: JSON.stringify(body),
  headers: { 'content-type': 'application/json', ...headers },
  signal,
});

const pathOf = (model) => `/v1/page/models/${encodeURIComponent(model)}`;

export const fetchModels = async () => (await call('/v1/page/models')).json();

export async function fetchFigures(model, replica, after) {
  const query = new URLSearchParams({ replica, after });
  return (await call(`${pathOf(model)}/figures?${query}`)).json();
}

/** Return an example as a bitmap: images in <img> would be fetched without the token. */
export async function fetchExample(model, name) {
  const response = await call(`${pathOf(model)}/examples/${encodeURIComponent(name)}`);
  return createImageBitmap(await response.blob());
}

export const predict = async (model, body) => (await post(`${pathOf(model)}/predict`, body)).json();

/**
 * Generate a text by OpenAI's API; `onText` gets the parts as they arrive. The result is the
 * server's accounting: times, tokens by path, budgets.
 */
export async function generate(model, prompt, maxTokens, tokenBudgetMs, onText) {
  const body = {
    model, prompt, max_tokens: maxTokens, temperature: 0, stream: true,
    stream_options: { include_usage: true },
  };
  const headers = { 'x-llm-d-slo-tpot-ms': String(tokenBudgetMs) };
  const response = await post('/v1/completions', body, headers);
  let accounting = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new CallFailed(200, event.error.message, event.error.code, 0);
    if (event.choices?.length) onText(event.choices[0].text ?? '');
    accounting = event.ladderstitch ?? accounting;
  }
  return accounting;
}

/** Yield the JSON of server-sent events; EventSource can neither post nor send a token. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split('\n\n');
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, '');
      if (data !== '[DONE]') yield JSON.parse(data);
    }
  }
}
