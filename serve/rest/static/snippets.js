// The request as commands that run: curl, Python, gRPC. The key itself is never shown, only its variable.

const KEY_VARIABLE = "FLAN_KEY";

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function server() {
  const { protocol, host, hostname, pathname } = window.location;
  const port = document.documentElement.dataset.grpcPort;
  return {
    isTls: protocol === "https:",
    rest: `${protocol}//${host}${pathname.replace(/\/$/, "")}`,
    grpc: Number(port) > 0 ? `${hostname}:${port}` : `${hostname}:GRPC_PORT`,
    hasGrpc: Number(port) >= 0,
  };
}

export function curl(body, hasKey) {
  const lines = [`curl -sN ${quote(`${server().rest}/v1/generate`)}`, "-H 'content-type: application/json'"];
  if (hasKey) lines.push(`-H "authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push(`-d ${quote(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

function pythonValue(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(pythonValue).join(", ")}]`;
  if (value !== null && typeof value === "object") {
    return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonValue(item)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

export function python(body, hasKey) {
  const { instruction, stream, ...fields } = body;
  const said = [pythonValue(instruction), ...Object.entries(fields).map(([name, value]) => `${name}=${pythonValue(value)}`)];
  const given = said.map((item) => `        ${item},`).join("\n");
  const address = JSON.stringify(server().rest);
  const lines = [...(hasKey ? ["import os", ""] : []), "from serve.client import FlanClient", ""];
  lines.push(`with FlanClient(${address}${hasKey ? `, api_key=os.environ["${KEY_VARIABLE}"]` : ""}) as client:`);
  if ((body.n ?? body.samples ?? 1) > 1) {
    lines.push(`    completion = client.generate(\n${given}\n    )`);
    lines.push("    for output in completion.outputs:\n        print(output.text)");
    if (body.mode === "cot") lines.push("    print(completion.answer, completion.votes)");
  } else {
    lines.push(`    stream = client.stream(\n${given}\n    )`);
    lines.push('    for delta in stream:\n        print(delta.text, end="", flush=True)\n    print()');
    if (body.mode === "cot") lines.push("    print(stream.completion.answer)");
  }
  return lines.join("\n") + "\n";
}

export function grpc(body, hasKey) {
  const { isTls, grpc: address, hasGrpc } = server();
  if (!hasGrpc) return "# This server runs without gRPC (--grpc-port -1).";
  const { stream, ...message } = body;
  message.mode = `MODE_${body.mode.toUpperCase()}`;
  if (body.answer_format) message.answer_format = `ANSWER_FORMAT_${body.answer_format.toUpperCase()}`;
  const lines = [`buf curl --protocol grpc${isTls ? "" : " --http2-prior-knowledge"}`];
  if (hasKey) lines.push(`-H "authorization: Bearer $${KEY_VARIABLE}"`, `--reflect-header "authorization: Bearer $${KEY_VARIABLE}"`);
  lines.push(quote(`${isTls ? "https" : "http"}://${address}/flan.v1.FlanService/GenerateStream`));
  lines.push(`-d ${quote(JSON.stringify(message, null, 2))}`);
  return lines.join(" \\\n  ");
}
