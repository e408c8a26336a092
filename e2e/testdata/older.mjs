// Prints greedy completions of PROMPTs, N tokens long, by node-llama-cpp with an F32 cache: LIBRARY MODEL N PROMPT…
const [library, modelPath, n, ...prompts] = process.argv.slice(2);
const {getLlama, LlamaCompletion, LlamaLogLevel} = await import(library);

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: 1024, threads: 1, flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"
});
const completion = new LlamaCompletion({contextSequence: context.getSequence()});
for (const prompt of prompts)
    console.log(JSON.stringify(await completion.generateCompletion(prompt, {maxTokens: Number(n), temperature: 0})));
await llama.dispose();
