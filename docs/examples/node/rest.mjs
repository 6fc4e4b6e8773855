// Streams an answer over REST with nothing but Node 20: fetch, and event streams read by hand.
//
//   node rest.mjs [http://localhost:8000]        FLAN_KEY=… where the server has keys

const server = process.argv[2] ?? "http://localhost:8000";
const key = process.env.FLAN_KEY;

const response = await fetch(`${server}/v1/generate`, {
  method: "POST",
  headers: { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) },
  body: JSON.stringify({
    mode: "cot",
    instruction: "Take the last letters of Paul Maria and join them.",
    stream: true,
  }),
  signal: AbortSignal.timeout(30_000), // closing the connection is what cancels a request
});
if (!response.ok) {
  const { error } = await response.json();
  throw new Error(`${response.status} ${error.code}: ${error.message} (${error.param})`);
}

let last;
for await (const frame of events(response.body)) {
  if (frame.error) throw new Error(frame.error.message); // a failure in the middle of the stream
  if (frame.usage) last = frame; // the frame behind all others
  else process.stdout.write(frame.text);
}
console.log(`\nanswer: ${last.answer}, tokens: ${last.usage.total_tokens}`);

// The data frames of an event stream, until [DONE].
async function* events(body) {
  let buffer = "";
  for await (const text of body.pipeThrough(new TextDecoderStream())) {
    buffer += text;
    const complete = buffer.split("\n\n");
    buffer = complete.pop();
    for (const event of complete) {
      if (!event.startsWith("data: ")) continue; // ": keepalive"
      if (event === "data: [DONE]") return;
      yield JSON.parse(event.slice("data: ".length));
    }
  }
  throw new Error("the stream ended early");
}
