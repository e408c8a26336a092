// Streams a chat answer with Ollama's official client: node ollama.mjs MODEL TEXT N
import { Ollama } from 'ollama'

const [model, text, n] = process.argv.slice(2)
const headers = process.env.API_KEY ? { Authorization: `Bearer ${process.env.API_KEY}` } : {}
const client = new Ollama({ host: process.env.OLLAMA_HOST, headers })
const stream = await client.chat({
  model, stream: true, options: { temperature: 0, num_predict: Number(n) },
  messages: [{ role: 'system', content: 'Be brief.' }, { role: 'user', content: text }],
})
let chunks = 0
for await (const part of stream) {
  if (part.message.content) { chunks++; process.stdout.write(part.message.content) }
}
process.stderr.write(`${chunks}\n`)
