// OpenAI's own Node client. `node client.mjs <base URL> <key> <model> <scenario>` prints what it saw as one line of JSON.
import OpenAI from "openai";

const [baseURL, apiKey, model, scenario] = process.argv.slice(2);
const messages = [{ role: "user", content: "def split(self" }];
const greedy = { model, temperature: 0, max_tokens: 12, ignore_eos: true };

function client(maxRetries = 0) {
  return new OpenAI({ baseURL, apiKey, maxRetries, timeout: 120_000 });
}

// The class, status and fields of the error that `call` ends with.
async function failure(call) {
  try {
    await call();
  } catch (error) {
    const { status, code, param, type, message } = error;
    const retryAfter = error.headers?.get("retry-after") ?? null;
    return { kind: error.constructor.name, status, code, param, type, message, retryAfter };
  }
  return { kind: "none" };
}

const scenarios = {
  async answers() {
    const openai = client();
    const models = [];
    for await (const one of openai.models.list()) models.push(one.id);
    const whole = await openai.chat.completions.create({ ...greedy, messages });
    const stream = await openai.chat.completions.create({
      ...greedy, messages, stream: true, stream_options: { include_usage: true },
    });
    let text = "", chunks = 0, usage = null, finish = null;
    for await (const chunk of stream) {
      chunks += 1;
      text += chunk.choices[0]?.delta?.content ?? "";
      finish = chunk.choices[0]?.finish_reason ?? finish;
      usage = chunk.usage ?? usage;
    }
    const prompt = "class Worker";
    const completion = await openai.completions.create({ ...greedy, prompt });
    let streamed = "";
    for await (const chunk of await openai.completions.create({ ...greedy, prompt, stream: true })) {
      streamed += chunk.choices[0]?.text ?? "";
    }
    return {
      models, chunks, finish, text, chat: whole.choices[0].message.content, usage: usage?.completion_tokens,
      completion: completion.choices[0].text, streamed, id: completion._request_id,
    };
  },

  async errors() {
    const openai = client();
    const chat = (fields) => failure(() => openai.chat.completions.create({ ...greedy, messages, ...fields }));
    return {
      unknownModel: await chat({ model: "other" }),
      badField: await chat({ temperature: -1 }),
      badFieldStreamed: await chat({ temperature: -1, stream: true }),
      unknownPath: await failure(() => openai.embeddings.create({ model, input: "a" })),
    };
  },

  // A stream that the client leaves.
  async abort() {
    const stream = await client().chat.completions.create({ ...greedy, max_tokens: 200, messages, stream: true });
    let chunks = 0;
    for await (const _ of stream) {
      chunks += 1;
      if (chunks === 3) stream.controller.abort();
    }
    return { chunks };
  },

  // One request as it is refused, then one by a client that tries again by itself.
  async retry() {
    const request = { model, prompt: "a", max_tokens: 1 };
    const refused = await failure(() => client(0).completions.create(request));
    const started = performance.now();
    const answer = await client(3).completions.create(request);
    return { refused, waitedS: (performance.now() - started) / 1000, text: answer.choices[0].text };
  },

  async one() {
    return failure(() => client().completions.create({ model, prompt: "a", max_tokens: 1 }));
  },
};

console.log(JSON.stringify(await scenarios[scenario]()));
