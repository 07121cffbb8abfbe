// OpenAI's own client for Node.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { alike, CHAT, ENCODER, run, URL } from "./checks.mjs";

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "unused", maxRetries: 0, timeout: 120_000 });
const question = [{ role: "user", content: "What is the capital of France?" }];
const chat = { model: CHAT, messages: question, temperature: 0, max_tokens: 24 };
const long = { ...chat, messages: [{ role: "user", content: "Write a very long story about the sea." }], max_tokens: 2000, ignore_eos: true };
const city = { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"] };
const tools = [{ type: "function", function: { name: "weather", description: "The weather in a city.", parameters: city } }];

async function refused(kind, code, wrong) {
  for (const stream of [false, true]) {
    await assert.rejects(client.chat.completions.create({ ...chat, ...wrong, stream }), (error) => {
      assert.ok(error instanceof kind, `${error}`);
      assert.equal(error.code, code);
      assert.ok(error.requestID);
      return true;
    });
  }
}

await run("openai", {
  async "models are listed and described"() {
    const listed = [];
    for await (const model of client.models.list()) listed.push(model.id);
    assert.ok(listed.includes(CHAT) && listed.includes(ENCODER), `${listed}`);
    assert.equal((await client.models.retrieve(CHAT)).object, "model");
  },

  async "a question gets an answer that names its version"() {
    const { data, response } = await client.chat.completions.create(chat).withResponse();
    assert.match(data.choices[0].message.content, /Paris/);
    assert.equal(response.headers.get("x-model-version"), `${CHAT}@1`);
    assert.equal(data.model, `${CHAT}@1`);
  },

  async "a stream is the same text and ends with the usage"() {
    const whole = await client.chat.completions.create(chat);
    const stream = await client.chat.completions.create({ ...chat, stream: true, stream_options: { include_usage: true } });
    let text = "";
    let usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.total_tokens, whole.usage.total_tokens);
  },

  async "the streams helper puts the answer together"() {
    const stream = client.chat.completions.stream(chat);
    assert.match(await stream.finalContent(), /Paris/);
  },

  async "a tool is called whole and as a stream"() {
    const asked = { ...chat, messages: [{ role: "user", content: "What is the weather in Paris?" }], max_tokens: 100, tools };
    for (const tool_choice of ["required", { type: "function", function: { name: "weather" } }]) {
      const whole = await client.chat.completions.create({ ...asked, tool_choice });
      const [call] = whole.choices[0].message.tool_calls;
      assert.equal(call.function.name, "weather");
      assert.ok("city" in JSON.parse(call.function.arguments), call.function.arguments);
      const streamed = await client.chat.completions.stream({ ...asked, tool_choice }).finalChatCompletion();
      assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
    }
  },

  async "a tool's function runs and the model goes on with its result"() {
    let called = 0;
    const weather = {
      type: "function",
      function: { name: "weather", description: "The weather in a city.", parameters: city, parse: JSON.parse, function: () => `Snow ${++called}` },
    };
    const messages = [{ role: "user", content: "What is the weather in Paris?" }];
    const asked = { ...chat, messages, max_tokens: 100, tools: [weather], tool_choice: { type: "function", function: { name: "weather" } } };
    await client.chat.completions.runTools(asked, { maxChatCompletions: 2 }).done();
    assert.ok(called >= 1);
  },

  async "an answer follows a schema"() {
    const Person = z.object({ name: z.string().max(20), age: z.number().int().min(0).max(150) });
    const messages = [{ role: "user", content: "Ada is 36 years old. Give her name and age." }];
    const answer = await client.chat.completions.parse({ ...chat, messages, max_tokens: 80, response_format: zodResponseFormat(Person, "person") });
    assert.equal(typeof answer.choices[0].message.parsed.age, "number");
  },

  async "completions are whole and streamed"() {
    const asked = { model: CHAT, prompt: "The capital of France is", max_tokens: 5, temperature: 0 };
    const whole = await client.completions.create(asked);
    let text = "";
    for await (const chunk of await client.completions.create({ ...asked, stream: true })) text += chunk.choices[0].text;
    assert.equal(text, whole.choices[0].text);
  },

  async "responses come whole and as a stream"() {
    const asked = { model: CHAT, input: question[0].content, temperature: 0, max_output_tokens: 24 };
    const whole = await client.responses.create(asked);
    assert.match(whole.output_text, /Paris/);
    const streamed = await client.responses.stream(asked).finalResponse();
    assert.equal(streamed.output_text, whole.output_text);
  },

  async "vectors are alike where the texts are"() {
    const input = ["a dog", "a puppy", "taxes are due in April"];
    const [dog, puppy, taxes] = (await client.embeddings.create({ model: ENCODER, input })).data.map((one) => one.embedding);
    assert.equal(dog.length, 384);
    assert.ok(alike(dog, puppy) > 0.6 && alike(dog, taxes) < 0.4);
  },

  async "errors are those of the client"() {
    await refused(OpenAI.NotFoundError, "model_not_found", { model: "nobody" });
    await refused(OpenAI.BadRequestError, "context_length_exceeded", { max_tokens: 1_000_000 });
    await refused(OpenAI.BadRequestError, "invalid_request", { temperature: -1 });
  },

  async "a stream that is left ends"() {
    const stream = await client.chat.completions.create({ ...long, stream: true });
    for await (const chunk of stream) break;
    stream.controller.abort();
  },

  async "a request that is aborted ends"() {
    const asked = client.chat.completions.create(long, { signal: AbortSignal.timeout(1000) });
    await assert.rejects(asked, OpenAI.APIUserAbortError);
  },
});
