// The official OpenAI client for Node, unmodified: what it gets is printed as one line of JSON for the caller to check.
import OpenAI from "openai";

const [url, token, wrongToken, model, ...texts] = process.argv.slice(2);
const connect = (apiKey) => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const client = connect(token);

async function describeFailure(call) {
  try {
    await call();
    return null;
  } catch (error) {
    return { status: error.status, message: error.message, code: error.code, requestId: error.requestID };
  }
}

const one = await client.embeddings.create({ model, input: texts[0] });
const many = await client.embeddings.create({ model, input: texts });
const floats = await client.embeddings.create({ model, input: texts[0], encoding_format: "float" });
const models = await client.models.list();
console.log(
  JSON.stringify({
    one: one.data[0].embedding,
    many: many.data.map((row) => row.embedding),
    floats: floats.data[0].embedding,
    usage: one.usage,
    models: models.data.map((listed) => listed.id),
    overLong: await describeFailure(() => client.embeddings.create({ model, input: "snow ".repeat(600) })),
    wrongModel: await describeFailure(() => client.embeddings.create({ model: "no-such-model", input: "a" })),
    wrongToken: await describeFailure(() => connect(wrongToken).embeddings.create({ model, input: "a" })),
  }),
);
