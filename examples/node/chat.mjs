// Streams a chat answer with the official client: node chat.mjs TEXT N
import OpenAI from 'openai'

const [text, n] = process.argv.slice(2)
const client = new OpenAI({ maxRetries: 0 })
const stream = await client.chat.completions.create({
  model: process.env.MODEL ?? 'any', stream: true, temperature: 0, max_tokens: Number(n),
  messages: [{ role: 'user', content: text }],
})
let chunks = 0
for await (const part of stream) {
  const delta = part.choices[0]?.delta?.content
  if (delta) { chunks++; process.stdout.write(delta) }
}
process.stderr.write(`${chunks}\n`)
