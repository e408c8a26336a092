// The stream of events, read with fetch, since EventSource cannot send a key.

export class KeyNeeded extends Error {}

// Refused says why in words for people.
export class Refused extends Error {}

// A stream that is silent for so long is dead, even if the connection does not know it yet.
const silence = 5000;

// snapshots yields what comes, and ends or throws when the stream does.
export async function* snapshots(url, key) {
  const control = new AbortController();
  let watchdog;
  const alive = () => {
    clearTimeout(watchdog);
    watchdog = setTimeout(() => control.abort(), silence);
  };
  alive();
  try {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const response = await fetch(url, { headers, signal: control.signal, cache: "no-store" });
    if (response.status === 401) throw new KeyNeeded();
    if (!response.ok) throw new Refused(await reason(response));
    let rest = "";
    for await (const part of parts(response.body)) {
      alive();
      const events = (rest + part).split("\n\n");
      rest = events.pop();
      for (const event of events) if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  } finally {
    clearTimeout(watchdog);
    control.abort();
  }
}

async function* parts(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}
