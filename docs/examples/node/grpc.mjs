// Streams an answer over gRPC, then sends many requests over one call. The contract is loaded as it is: no generated code.
//
//   npm install && node grpc.mjs [localhost:50051]        FLAN_KEY=… where the server has keys

import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const target = process.argv[2] ?? "localhost:50051";
const root = fileURLToPath(new URL("../../..", import.meta.url));
const contract = loadSync("protos/flan/v1/generation.proto", {
  includeDirs: [root],
  keepCase: true, // request_id, not requestId
  enums: String,
  longs: Number,
  defaults: true, // an empty text is "", not undefined
  oneofs: true, // event.event says which of its fields is there
});
const { FlanService } = grpc.loadPackageDefinition(contract).flan.v1;
const client = new FlanService(target, grpc.credentials.createInsecure());
const metadata = new grpc.Metadata();
if (process.env.FLAN_KEY) metadata.set("authorization", `Bearer ${process.env.FLAN_KEY}`);
const options = () => ({ deadline: Date.now() + 30_000 });

const question = { mode: "MODE_COT", instruction: "Take the last letters of Paul Maria and join them." };
for await (const event of client.GenerateStream(question, metadata, options())) {
  if (event.event === "delta") process.stdout.write(event.delta.text);
  else console.log(`\nanswer: ${event.final.answer}, tokens: ${event.final.usage.total_tokens}`);
}

const many = client.GenerateMany(metadata, options());
many.write({ request_id: "odd", instruction: "Find the odd one out.", input: "lemonade, spinach, garlic, broccoli" });
many.write({ request_id: "blank", instruction: " " });
many.end();
const results = new Map(); // they come as they finish
for await (const result of many) {
  results.set(result.request_id, result.result === "response" ? result.response.outputs[0].text : result.error.message);
}
for (const name of ["odd", "blank"]) console.log(`${name}: ${results.get(name)}`);

try {
  await unary("Generate", { instruction: "Name a colour.", temperature: 3 });
} catch (error) {
  console.log(`${grpc.status[error.code]}: ${error.details}`);
}
client.close();

function unary(method, request) {
  return new Promise((resolve, reject) =>
    client[method](request, metadata, options(), (error, response) => (error ? reject(error) : resolve(response))),
  );
}
