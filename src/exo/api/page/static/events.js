// Server-sent events of a reply. EventSource cannot send a key, so the reply is read as a stream.

/**
 * Reads the events of a reply.
 * @param {Response} reply
 * @yields {{name: string, data: string, comment: string}} An event, or a comment with empty data.
 */
export async function* readEvents(reply) {
  let name = "message";
  let data = [];
  for await (const line of lines(reply.body)) {
    if (line === "") {
      if (data.length) yield { name, data: data.join("\n"), comment: "" };
      name = "message";
      data = [];
    } else if (line.startsWith(":")) {
      yield { name: "", data: "", comment: line.slice(1).trim() };
    } else if (line.startsWith("data:")) {
      data.push(line.slice(line[5] === " " ? 6 : 5));
    } else if (line.startsWith("event:")) {
      name = line.slice(6).trim();
    }
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const part of parts) yield part.endsWith("\r") ? part.slice(0, -1) : part;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
